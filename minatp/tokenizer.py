"""The tokenizer: text to ids and back, and three control tokens.

<|start-latent|> and <|end-latent|> frame the latents; <|latent|> is the filler of --method pause.
Text is tokenised piece by piece (docs/method.md, Sequence), and text that a user wrote never
becomes a control token.
"""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

START, LATENT, END = "<|start-latent|>", "<|latent|>", "<|end-latent|>"


class Tokenizer:
    """A `tokenizers.Tokenizer` and the ids that the method needs: bos, eos, start, latent, end."""

    def __init__(self, backend, bos, eos, files=()):
        """backend: a `tokenizers.Tokenizer`. bos: an id.
        eos: ids; the first is written, any of them ends an answer.
        files: {name: bytes} of the files that came with it and are saved with it.
        """
        self.backend, self.bos, self.eos, self.files = backend, bos, tuple(eos), dict(files)

        # inside text, the name of a special token is split like any other word
        backend.encode_special_tokens = True
        backend.add_special_tokens([START, LATENT, END, *map(backend.id_to_token, (bos, *eos))])
        self.start, self.latent, self.end = (backend.token_to_id(t) for t in (START, LATENT, END))

        # Other programs that load this tokenizer put before a text whatever its post-processor
        # says. Make that bos, because π has never read a text without it. (`encode` and `prompts`
        # below do not use it)
        if backend.encode("").ids != [bos, *self.encode("")]:
            backend.post_processor = bos_before_text(backend.id_to_token(bos), bos)

    def __len__(self):
        """The size of the smallest embedding that holds every id."""
        return 1 + max(self.backend.get_vocab().values())

    def encode(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        return [e.ids for e in self.backend.encode_batch(texts, add_special_tokens=False)]

    def encode_split(self, texts, at):
        """Of each text its ids, and how many of them end at or before the character at[i]."""
        encoded = []
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        for encoding, character in zip(encodings, at):
            n_before = sum(end <= character for _, end in encoding.offsets)
            encoded.append((encoding.ids, n_before))
        return encoded

    def encode_answers(self, answers):
        """ "### " + answer, of each of some answers -> (its ids, how many come before the answer).

        The first token that covers a character of the answer may cover some of "### " as well.
        """
        texts = ["### " + answer for answer in answers]
        return self.encode_split(texts, [len("### ")] * len(texts))

    def decode(self, ids):
        return self.backend.decode([i for i in ids if i not in self.eos], skip_special_tokens=False)

    def prompt(self, question):
        """bos question "\\n" <|start-latent|>"""
        return self.prompts([question])[0]

    def prompts(self, questions):
        """`prompt` of each question."""
        ids_of_questions = self.encode_batch([question + "\n" for question in questions])
        return [[self.bos, *ids, self.start] for ids in ids_of_questions]


def bos_before_text(token, bos):
    """A post-processor that puts bos, a token and its id, before each text."""
    return processors.TemplateProcessing(
        single=[token, "$A"],
        pair=[token, "$A", f"{token}:1", "$B:1"],
        special_tokens=[(token, bos)],
    )


def train_tokenizer(problems, vocab_size):
    """A Tokenizer learned from problems: a byte-level BPE of at most `vocab_size` ids, control
    tokens included.

    A word keeps the spaces around it and a number stands alone, so that frequent words and numbers
    become one token each.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    pieces = tokenizers.Regex(r" ?\p{L}+ ?|\p{N}+|[^\p{L}\p{N}\s]+\s?|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()

    control_tokens = ("<|bos|>", "<|eos|>", START, LATENT, END)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[tokenizers.AddedToken(t, special=True) for t in control_tokens],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [
        "".join((p.question, "\n", *(step + "\n" for step in p.steps), "### ", p.answer))
        for p in problems
    ]
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, bos=0, eos=(1,))
