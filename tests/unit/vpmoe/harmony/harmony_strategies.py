"""Texts that try to break out of their message, and conversations made of them."""

from hypothesis import strategies as st

from vpmoe.harmony.conversation import Message
from vpmoe.tokenizer.o200k_harmony import NAMED_SPECIAL_TOKENS

HOSTILE = st.lists(
    st.sampled_from(
        [*NAMED_SPECIAL_TOKENS, "<|reserved_200010|>", "assistant", "final", " ", "\n", "é", "漢字", "😀", "7"]
    ),
    min_size=1,
    max_size=8,
).map("".join)
TEXTS = (st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1) | HOSTILE).filter(
    lambda text: not text.isspace()
)


def conversations(texts: st.SearchStrategy[str] = TEXTS) -> st.SearchStrategy[tuple[Message, ...]]:
    """[system] [developer] user analysis final."""
    optional = st.none() | texts
    return st.builds(
        lambda system, developer, user, analysis, final: (
            *([Message("system", system)] if system else []),
            *([Message("developer", developer)] if developer else []),
            Message("user", user),
            Message("assistant", analysis, "analysis"),
            Message("assistant", final, "final"),
        ),
        optional,
        optional,
        texts,
        texts,
        texts,
    )
