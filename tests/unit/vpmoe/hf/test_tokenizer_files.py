"""An export's tokenizer files, whether the vocabulary is ours or came with files of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoConfig, AutoTokenizer

from tests.tiny_student import write_student, write_vocabulary
from vpmoe.errors import TokenizerError, WeightsError
from vpmoe.hf import tokenizer_files
from vpmoe.hf.chat_template import chat_template
from vpmoe.hf.convert import Carried, export_checkpoint, open_directory
from vpmoe.tokenizer.bpe import save_bpe, train_bpe
from vpmoe.tokenizer.o200k_harmony import NAMED_SPECIAL_TOKENS
from vpmoe.weights.megatron_checkpoint import read_config, read_state

ROWS = 384
SMALL = {"padded_vocab_size": ROWS, "num_layers": 2, "window_attn_skip_freq": 2, "num_experts": None}


def export(root: Path, assets: list[Path]) -> Path:
    return export_checkpoint(write_student(root / "megatron", assets=assets, **SMALL), root / "hf").path


@pytest.mark.slow
def test_files_of_another_tokenizer_are_copied_and_name_its_end(tmp_path: Path) -> None:
    save_bpe(train_bpe(["the ship left the harbour"], 300), tmp_path / "bpe")
    told = tmp_path / "bpe" / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["owner/repository--code.Tokenizer", None]}}
    told.write_text(json.dumps(json.loads(told.read_text()) | code))
    exported = export(tmp_path, tokenizer_files.assets_of(tmp_path / "bpe"))
    assert "auto_map" not in json.loads((exported / "tokenizer_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    config = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    assert config.eos_token_id == config.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert config.bos_token_id is None
    assert not (exported / "chat_template.jinja").exists()
    assert {path.name for path in open_directory(exported).assets} == {"tokenizer.json", "tokenizer_config.json"}
    name = "tokenizer.json"
    assert (exported / name).read_bytes() == (tmp_path / "bpe" / name).read_bytes()


@pytest.mark.parametrize("name", ["modeling_vpmoe.py", "config.json", "model.safetensors"])
def test_a_checkpoint_of_others_replaces_no_code_of_an_export(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("raise SystemExit")
    with pytest.raises(WeightsError, match=f"{name} is no file of a tokenizer"):
        export(tmp_path, [tmp_path / name])


def test_a_checkpoint_of_others_names_no_code_in_an_export(tmp_path: Path) -> None:
    kept = {"auto_map": {"AutoModelForCausalLM": "owner/repository--code.Model"}, "max_position_embeddings": 96}
    checkpoint = write_student(tmp_path / "megatron", kept=kept, **SMALL)
    cfg, written = read_config(checkpoint), read_state(checkpoint)
    assert Carried.of(checkpoint, cfg).hf_config == {"max_position_embeddings": 96}
    strange = {"vocab_size": ("x", -5, ROWS + 1), "prompts": (5, {"other": "text"}), "hf_config": ([1],)}
    for key, value in [(key, value) for key, values in strange.items() for value in values]:
        (checkpoint / "run_state.json").write_text(json.dumps({**written, key: value}))
        with pytest.raises(WeightsError, match=key):
            Carried.of(checkpoint, cfg)


@pytest.mark.slow
def test_an_export_has_a_row_for_every_id(tmp_path: Path) -> None:
    save_bpe(train_bpe(["the ship left the harbour"], 300), tmp_path / "bpe")
    assets = tokenizer_files.assets_of(tmp_path / "bpe")
    small = SMALL.copy()
    small["padded_vocab_size"] = 256
    checkpoint = write_student(tmp_path / "megatron", assets=assets, **small)
    with pytest.raises(TokenizerError, match=r"ids up to \d+, and the embedding 256 rows"):
        export_checkpoint(checkpoint, tmp_path / "hf")


@pytest.mark.slow
def test_whoever_has_harmonys_tokens_gets_our_template(tmp_path: Path) -> None:
    tokenizer = train_bpe(["the ship left the harbour"], 300)
    tokenizer.add_special_tokens([token for token in NAMED_SPECIAL_TOKENS if tokenizer.token_to_id(token) is None])
    save_bpe(tokenizer, tmp_path / "donor")
    (tmp_path / "donor" / "chat_template.jinja").write_text("another")
    exported = export(tmp_path, tokenizer_files.assets_of(tmp_path / "donor"))
    specials = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    assert (exported / "chat_template.jinja").read_text() == chat_template(None, specials)
    theirs = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    assert theirs.chat_template == chat_template(None, specials)
    with pytest.raises(TemplateError, match=r"spells the special token <\|im_start\|>"):
        theirs.apply_chat_template([{"role": "user", "content": "<|im_start|>"}])


@pytest.mark.slow
def test_a_compact_vocabulary_is_opened_without_running_the_directorys_code(tmp_path: Path) -> None:
    exported = export(tmp_path, write_vocabulary(tmp_path / "vocabulary", "the ship", ROWS))
    (exported / "tokenization_vpmoe.py").write_text("raise SystemExit")
    tokenizer = tokenizer_files.open_tokenizer(exported)
    assert tokenizer.decode(tokenizer("the ship, naïve")["input_ids"]) == "the ship, naïve"
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|return|>", "<|call|>", "<|endoftext|>")]
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == ends
    assert json.loads((exported / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id
    names = {path.name for path in open_directory(exported).assets}
    assert names == {"vocabulary.json", "compact_vocab.npy", "generation_config.json"}


def test_a_directory_without_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no tokenizer there"):
        tokenizer_files.open_tokenizer(tmp_path)
