"""Settings and strategies of the property tests.

1,000 examples each, always the same; 10,000 and new ones with MINATP_LONG=1.
"""

import os

from hypothesis import settings
from hypothesis import strategies as st

LONG = os.environ.get("MINATP_LONG") == "1"
thorough = settings(
    max_examples=10_000 if LONG else 1000,
    derandomize=not LONG,
    deadline=None,
    database=None,
)

# any text but half a character (Cs: surrogates), which no file can hold
words = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)

# what looks like an answer or a step
almost_numbers = st.text("0123456789-+*/=.,$%#<>() \n", max_size=16)

any_text = st.one_of(words, almost_numbers)
