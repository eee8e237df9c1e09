"""A ladder of one rung: a random Qwen3 with a vocabulary of its own, texts and questions to evaluate it on."""

from __future__ import annotations

from pathlib import Path

from tests.suites_in_training import CANARIES, CORE8
from tests.tiny_core_bundle import write_bundle
from tests.tiny_qwen3 import write_qwen3
from vpmoe.data_curation.tasks.question_texts import write_texts
from vpmoe.data_curation.tasks.synth_mini import generate
from vpmoe.tokenizer.bpe import save_bpe, train_bpe
from vpmoe.upcycle.ladder_file import Evaluation

ROWS = 344
LADDER = """
folder = "{root}"
target = "model"
reports = "{root}/reports"
[evaluation]
texts = "{root}/texts/test.jsonl"
documents = 9
characters = 60
questions = "{root}/rows/test.jsonl"
per_family = 4
max_new_tokens = 6
batch_size = {batch_size}
[[evaluation.suites]]
suite = "core8"
items = 3
options = {{ config = "{root}/core8.toml", bundle = "{root}/bundle" }}
[[evaluation.suites]]
suite = "text"
name = "windows"
items = 5
options = {{ texts = "{root}/texts/test.jsonl", window = 24 }}
[[evaluation.suites]]
suite = "canaries"
items = 1
options = {{ config = "{root}/canaries.toml", tasks = ["copying", "harmony", "pinned"] }}
[objects.model_hf]
rung = 0
[objects.model]
rung = 1
config = "{repository}/configs/qwen3_0_6b.yaml"
job = "import_qwen3"
inputs = {{ source = "model_hf" }}
settings = {{ prompt_lengths = [3], greedy_steps = 1 }}
[objects.model.overrides]
num_layers = 1
hidden_size = 32
ffn_hidden_size = 80
num_attention_heads = 4
num_query_groups = 2
kv_channels = 16
padded_vocab_size = {rows}
untie_embeddings_and_output_weights = false
"""


def write_ladder(root: Path, repository: Path) -> Path:
    """Write everything that a climb needs; returns the ladder's file."""
    generate(root / "rows", rows=60, seed=1, families={"sorting": 0.5, "maximum": 0.5})
    write_texts(root / "rows", root / "texts")
    texts = (root / "texts" / "pool.jsonl").read_text().splitlines()
    write_qwen3(root / "model_hf", vocab_size=ROWS, num_hidden_layers=1, hidden_size=32, initializer_range=0.05)
    save_bpe(train_bpe(texts, ROWS - 10), root / "model_hf")
    write_bundle(root / "bundle", 5)
    (root / "core8.toml").write_text(CORE8)
    (root / "canaries.toml").write_text(CANARIES)
    path = root / "ladder.toml"
    path.write_text(LADDER.format(root=root, repository=repository, rows=ROWS, batch_size=4))
    return path


def evaluation(root: Path, **changes: object) -> Evaluation:
    """The ladder's, with changes."""
    values = {
        "texts": root / "texts" / "test.jsonl",
        "documents": 9,
        "characters": 60,
        "questions": root / "rows" / "test.jsonl",
        "per_family": 4,
        "max_new_tokens": 6,
        "batch_size": 4,
    }
    return Evaluation.model_validate({**values, **changes})
