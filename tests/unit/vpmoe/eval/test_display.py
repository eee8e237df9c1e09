"""Colours of a conversation, valid or not."""

from __future__ import annotations

from vpmoe.eval.display import STYLES, harmony_text, spell


def styled(text) -> dict[str, str]:
    return {text.plain[span.start : span.end]: str(span.style) for span in text.spans}


def test_contents_take_the_colour_of_their_channel(ids, tokenizer) -> None:
    spelling = (
        "<|start|>user<|message|>why<|end|><|start|>assistant<|channel|>analysis<|message|>hm<|end|>"
        "<|start|>assistant<|channel|>final<|message|>so<|return|>"
    )
    text = harmony_text(ids(spelling), tokenizer)
    assert text.plain == spelling
    styles = styled(text)
    assert (styles["hm"], styles["so"]) == (STYLES["analysis"], STYLES["final"])
    assert styles["why"] not in STYLES.values() and styles["assistant"] == "dim"


def test_broken_text_is_shown_whole(ids, tokenizer) -> None:
    spelling = "x<|message|>analysis<|message|><|channel|>final"
    text = harmony_text(ids(spelling), tokenizer)
    assert text.plain == spelling
    assert "bold green" not in styled(text).values()


def test_what_hides_or_drives_a_terminal_is_shown(ids, tokenizer) -> None:
    spelling = "<|start|>assistant<|message|>a\x1b[31m\u202eb\u200b<|end|>\x07"
    shown = r"<|start|>assistant<|message|>a\x1b[31m\u202eb\u200b<|end|>\x07"
    assert harmony_text(ids(spelling), tokenizer).plain == shown


def test_padding_ids_are_named(ids, tokenizer) -> None:
    padding = tokenizer.padded_vocab_size - 1
    assert spell([*ids("ab"), padding, *ids("c")], tokenizer) == f"ab<|no token {padding}|>c"
