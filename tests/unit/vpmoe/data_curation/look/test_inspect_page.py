"""The page and the terminal show what a dataset holds, and hostile text stays text."""

import json
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from megatron_vpmoe.errors import visible
from vpmoe.cli import main
from vpmoe.data_curation.app import app
from vpmoe.data_curation.conversations.convert import convert
from vpmoe.data_curation.conversations.synth import resolve_synth
from vpmoe.data_curation.datasets.kd import build
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.look.inspect import inspect, write_page
from vpmoe.data_curation.look.text import RUN_KINDS, documents
from vpmoe.data_curation.manifest import read_manifest, write_manifest
from vpmoe.errors import DataError, NotOursError
from vpmoe.harmony.prompts import Prompts
from vpmoe.tokenizer import load_tokenizer

HOSTILE = {
    "query": "</div></body><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} {% raw %} <|end|> [red]x",
    "synthetic_reasoning": "\x1b[2J\x1b]0;owned\x07 \u202eevil\u202c \x9b31m \r &amp; <!-- \"'> ]]>",
    "synthetic_answer": "<style>*{display:none}</style> שלום 👩‍👩‍👧 end",
}


class _Page(HTMLParser):
    """Tags, all text of the body, and the runs of each class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.runs: list[tuple[str, str]] = []
        self._class = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        self._class = dict(attrs).get("class") or "" if tag == "span" else ""

    def handle_endtag(self, tag: str) -> None:
        self._class = ""

    def handle_data(self, data: str) -> None:
        if "pre" in self.tags:
            self.text += data
            self.runs.append((self._class, data))


@pytest.fixture(scope="module")
def hostile_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "rows").mkdir()
    rows = [{"synth_id": str(number), "language": "en", **HOSTILE} for number in range(3)]
    (folder / "rows" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert(resolve_synth(str(folder / "rows")), folder / "chat", num_shards=1, prompts=Prompts())
    options = BuildOptions(seq_len=1024, valid_fraction=0.0)
    build(folder / "chat", folder / "built", options, quiet=True)
    return folder / "built"


def test_the_page_holds_figures_histograms_and_documents(dataset_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["inspect", str(dataset_dir), "--html", str(page), "--count", "2"])
    assert result.exit_code == 0 and "page.html written" in result.output
    text = page.read_text()
    parsed = _Page(text)
    assert "train 0:" in parsed.text and "train 1:" in parsed.text and "train 2:" not in parsed.text
    manifest, tokenizer = read_manifest(dataset_dir), load_tokenizer(dataset_dir)
    # The legend says which class a kind has, and what is of the kind has it.
    classes = {kind: next(own for own, run in parsed.runs if run == kind and own) for kind in RUN_KINDS}
    assert len(set(classes.values())) == len(RUN_KINDS)
    for shown in documents(dataset_dir, manifest, tokenizer, "train", 0, 2):
        assert "".join(run for _, run in shown.runs) in parsed.text
        for kind, run in shown.runs:
            coloured = [stored for own, stored in parsed.runs if own == classes[kind]]
            assert all(any(line in stored for stored in coloured) for line in run.split("\n"))
    bars = parsed.text[parsed.text.index("tokens a document, train") :].split("tokens a document in each span")[0]
    counts = [int(line.split()[-1].replace(",", "")) for line in bars.splitlines()[1:] if line.strip()]
    assert sum(counts) == manifest["splits"]["train"]["rows"]
    assert not re.search(r"https?://|url\(|@import", text), "nothing is loaded"


def test_only_a_page_of_ours_is_replaced(dataset_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(dataset_dir, page)
    write_page(dataset_dir, page)
    page.write_text("<h1>years of work</h1>")
    with pytest.raises(NotOursError, match=r"page\.html"):
        write_page(dataset_dir, page)
    assert "years" in page.read_text()


def test_hostile_text_is_only_text_on_the_page(hostile_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(hostile_dir, page, count=3)
    text = page.read_text()
    parsed = _Page(text)
    assert not {"script", "img"} & set(parsed.tags) and parsed.tags.count("style") == parsed.tags.count("body") == 1
    assert HOSTILE["query"] in parsed.text, "the very characters, template marks too"
    assert visible(HOSTILE["synthetic_reasoning"]) in parsed.text
    assert visible(HOSTILE["synthetic_answer"]) in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_hostile_text_does_not_drive_the_terminal(hostile_dir: Path) -> None:
    console = Console(record=True, width=200, force_terminal=True, color_system=None)
    with console.capture() as capture:
        inspect(hostile_dir, console, count=1)
    shown = capture.get()
    assert "\x1b[2J" not in shown and "\x07" not in shown and "\u202e" not in shown and "\x9b" not in shown
    assert r"\x1b[2J\x1b]0;owned\x07" in shown and r"\u202eevil" in shown and "[red]x" in shown


def test_the_terminal_shows_lengths_of_each_span(dataset_dir: Path) -> None:
    console = Console(record=True, width=160)
    inspect(dataset_dir, console, count=0)
    shown = console.export_text()
    assert "tokens a document in each span, all" in shown
    assert "spans: context  analysis  final  special" in shown


def test_conversations_are_no_token_files(conversations_dir: Path) -> None:
    with pytest.raises(DataError, match="of kind 'harmony_conversations', expected harmony_kd"):
        inspect(conversations_dir, Console(record=True))


@pytest.mark.parametrize("verb", [["inspect"], ["stats"]])
def test_a_manifest_of_the_wrong_shape_is_named(verb: list[str], dataset_dir: Path, tmp_path: Path, capsys) -> None:
    manifest = read_manifest(dataset_dir)
    write_manifest(tmp_path, {name: manifest[name] for name in ("schema_version", "kind")})
    second = [str(dataset_dir)] if verb == ["stats"] else []
    assert main(["data", *verb, str(tmp_path), *second]) == 2
    assert "splits: Field required" in capsys.readouterr().err


def test_line_feeds_tabs_and_letters_stay_and_nothing_hides() -> None:
    assert visible("a\tb\nc\rd\x00é") == "a\tb\nc\\rd\\x00é"
    readable = "naïve — 東京\u3000か\u3099 🙂 العربية\u0600 नमस्ते \u202f\xa0"
    assert visible(readable) == readable
    hidden = [
        chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]
    hidden += [*"\u034f\u115f\u3164\uffa0\ufe0f\u2800", chr(0xE0100)]
    signs = set("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
    assert {character for character in hidden if visible(character) == character} == signs | {"\n", "\t"}
    told = str(DataError("a\u202eb", source="\x1b[31m"))
    assert "\\u202e" in told and "\\x1b" in told and "\x1b" not in told
