"""One short run for all tests of the tools, with weights at which its chains disagree."""

from types import SimpleNamespace

import pytest

import train
from minatp import problems
from minatp.run import evaluate
from minatp.run.huggingface import load_model, save_model

from commands import run
from small import SMALL, make_ragged


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of a run whose chains have all lengths and whose answers differ."""
    out = tmp_path_factory.mktemp("tools") / "run"
    few = ["--epochs", "0.1", "--test-size", 4, "--answers", 4, "--seed", 1]
    run(train.main, *SMALL, *few, "--distill", 0, "--out", out)
    model, tokenizer = make_ragged(*load_model(out))
    save_model(out / "final", model, tokenizer)
    return out


@pytest.fixture(scope="session")
def solved(folder):
    """The run's model, 24 problems, their prompts and `mean`, their mean chains with latents."""
    model, tokenizer = load_model(folder)
    test_problems = problems.generate("test", 24, 0)
    prompts = [tokenizer.prompt(p.question) for p in test_problems]
    mean = evaluate.solve(model, tokenizer, prompts, 6, keep_z=True)
    assert {chain.n_latent for chain in mean} == {0, 2, 4}
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, problems=test_problems, prompts=prompts, mean=mean
    )
