"""A teacher of transformers, whole or read layer by layer; a teacher of a larger vocabulary, and of another mode."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vpmoe.annotation import NO_RECORD
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.model.attention.masks import SequenceLayout
from tests.tiny_student import write_student
from vpmoe.cli import main
from vpmoe.data_curation.manifest import read_manifest as raw_manifest
from vpmoe.eval.open_model import open_model
from vpmoe.harmony.parse import Parser
from vpmoe.harmony.prompts import with_reasoning_effort
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.teacher.hf import HFTeacher
from vpmoe.teacher.interface import Conversation, Question
from vpmoe.tokenizer import CompactVocabulary, load_tokenizer
from vpmoe.tokenizer.o200k_harmony import load_o200k_harmony

pytestmark = pytest.mark.slow
K, LAYERS = 8, 10


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset of plain text in a learned vocabulary, and a Llama of 125 MB in fp32 with it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hf")
    lines = [json.dumps({"text": f"The number {n} follows {n - 1}, and {n * n} is its square."}) for n in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    model = folder / "llama"
    learn = ["--input", str(folder / "texts.jsonl"), "--output-dir", str(model), "--vocab-size", "300"]
    assert main(["tokenizer", "train", *learn]) == 0
    build = ["--input", str(folder / "texts.jsonl"), "--tokenizer", str(model), "--valid-fraction", "0.1", "--quiet"]
    assert main(["data", "build-text", *build, "--output-dir", str(folder / "dataset"), "--seq-len", "64"]) == 0
    size = read_manifest(folder / "dataset").tokenizer.padded_vocab_size
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 8000, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=size, num_key_value_heads=1, initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(model)
    return folder / "dataset", model


def scored(dataset: Path, model: Path, output: Path, *more: str) -> None:
    where = ["--teacher", str(model), "--by", "hf", "--output-dir", str(output), "--top-k", str(K), "--quiet"]
    how = ["--coding", "exact", "--batch-tokens", "128", "--token-budget", "600"]
    assert main(["data", "score", str(dataset), *where, *how, *more]) == 0


def test_layers_from_disk_say_the_same_in_less_memory(texts: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dataset, model = texts
    scored(dataset, model, tmp_path / "whole")
    scored(dataset, model, tmp_path / "streamed", "--memory-gb", "0.03")
    teacher = HFTeacher(model, bf16=None, device="cpu", memory_gb=0.03, tokens=64)
    weights, held = (model / "model.safetensors").stat().st_size, []
    with teacher.open(Question(K, 1.0, np.arange(K)), None) as scorer:
        network = scorer._model

        def note(*_: object) -> None:
            held.append(sum(each.nbytes for each in network.parameters() if each.device.type != "meta"))

        for layer in network.model.layers:
            layer.mlp.act_fn.register_forward_pre_hook(note)
        some = np.arange(9)
        list(scorer.score([Conversation(some, some[:-1], some[1:])]))
    # Of ten layers two are kept; of the one at work, a matrix at a time.
    assert len(held) == 3 * LAYERS and max(held) < 0.03e9 + 0.05 * weights < 0.3 * weights
    theirs = AutoModelForCausalLM.from_pretrained(model)
    ours = [KDDataset(read_manifest(tmp_path / name), "train", seq_length=64) for name in ("whole", "streamed")]
    for row in range(10):
        first, second = (made[row].annotations for made in ours)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
        document = ours[0][row]
        with torch.no_grad():
            log_p = theirs(torch.from_numpy(document.tokens.astype(np.int64))[None]).logits[0].double().log_softmax(-1)
        top = log_p[:-1, : read_manifest(dataset).tokenizer.vocab_size].topk(K)  # padding is no id
        np.testing.assert_allclose(first["teacher_log_p"][:-1], top.values, atol=1e-4)
        assert (first["teacher_ids"][:-1] == top.indices.numpy()).mean() > 0.99


def one_by_one(folder: Path, size: int) -> None:
    """Qwen3-MoE: experts are saved one by one, and computed with together."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "head_dim": 32}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=size, **shape)).to(torch.bfloat16).save_pretrained(folder)


def in_mxfp4(folder: Path, size: int) -> None:
    """GPT-OSS as it is published: the experts' weights in blocks of 32, a scale to each."""
    from safetensors.torch import load_file, save_file
    from transformers import GptOssConfig, GptOssForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 32, "sliding_window": 32}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    GptOssForCausalLM(GptOssConfig(vocab_size=size, **shape)).to(torch.bfloat16).save_pretrained(folder)
    file, packed = next(folder.glob("*.safetensors")), {}
    for name, values in load_file(file).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, of, to = values.shape
            packed[f"{name}_blocks"] = torch.randint(0, 256, (experts, to, of // 32, 16), dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.full((experts, to, of // 32), 120, dtype=torch.uint8)
        else:
            packed[name] = values
    save_file(packed, file, metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("save", [one_by_one, in_mxfp4])
def test_layers_that_are_saved_in_another_form_stream_too(
    save: Callable[[Path, int], None], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    save(tmp_path, read_manifest(texts[0]).tokenizer.padded_vocab_size)
    shutil.copy(texts[1] / "tokenizer.json", tmp_path)
    some, said = np.arange(40), []
    for memory in (None, 0.0):
        teacher = HFTeacher(tmp_path, bf16=None, device="cpu", memory_gb=memory, tokens=64)
        with teacher.open(Question(K, 1.0, np.arange(256)), None) as scorer:
            assert (memory is None) == all(each.device.type != "meta" for each in scorer._model.parameters())
            [[answer]] = scorer.score([Conversation(some, some[:-1], some[1:])])
            said.append(answer.records)
    for whole, streamed in zip(*said, strict=True):
        np.testing.assert_array_equal(whole, streamed)


def test_another_vocabulary_is_refused(texts: tuple[Path, Path], kd_dataset: Path, tmp_path: Path, capsys) -> None:
    where = ["--teacher", str(texts[1]), "--by", "hf", "--output-dir", str(tmp_path / "no"), "--top-k", str(K)]
    assert main(["data", "score", str(kd_dataset), *where]) == 2
    assert "id 256 of the dataset is" in capsys.readouterr().err
    assert main(["data", "score", str(kd_dataset), *where, "--device", "foo"]) == 2
    assert "there is no such device" in capsys.readouterr().err


@pytest.fixture(scope="module")
def full_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the whole of o200k."""
    folder, full = tmp_path_factory.mktemp("full"), load_o200k_harmony()
    told = {key: getattr(full, key) for key in ("name", "rank_file_sha256", "vocab_size", "padded_vocab_size")}
    (folder / "vocabulary.json").write_text(json.dumps(told))
    size = full.padded_vocab_size
    how = {"vocab_size": size, "padded_vocab_size": size, "hidden_size": 16, "num_layers": 2}
    return write_student(folder, assets=[folder / "vocabulary.json"], **how)


def test_a_teacher_of_the_full_vocabulary_in_another_mode(kd_dataset: Path, full_teacher: Path, tmp_path: Path) -> None:
    """Asked in its ids, with its system message; positions are the student's, and what it has not is the tail's."""
    where = ["--teacher", str(full_teacher), "--output-dir", str(tmp_path / "high"), "--top-k", str(K), "--quiet"]
    how = ["--coding", "exact", "--token-budget", "300", "--reasoning", "high"]
    assert main(["data", "score", str(kd_dataset), *where, *how]) == 0
    told = raw_manifest(tmp_path / "high")["annotated"][-1]
    assert told["by"]["reasoning"] == "high" and told["mean_lost_mass"] > 0 and told["short_records"] == 0
    student, full = load_tokenizer(kd_dataset), load_o200k_harmony()
    assert isinstance(student, CompactVocabulary)
    dataset = KDDataset(read_manifest(tmp_path / "high"), "train", seq_length=192)
    with open_model(full_teacher) as opened, torch.no_grad():
        for document in (dataset[row] for row in range(2)):
            places = np.flatnonzero(document.loss_mask)
            messages = [each.message for each in Parser(student).parse(document.tokens[:-1].tolist())]
            system = FastRenderer(full).render(with_reasoning_effort(messages[:1], "high")).tokens()
            end = int(np.flatnonzero(document.tokens == student.special_id("<|end|>"))[0]) + 1
            tokens = np.concatenate([system, student.o200k_ids[document.tokens[end:]]]).astype(np.int64)
            layout = SequenceLayout(torch.zeros(1, len(tokens), dtype=torch.int32), torch.arange(len(tokens))[None])
            log_p = opened.model(torch.from_numpy(tokens)[None], layout).logits()[0].double().log_softmax(-1)
            inside = log_p[places + len(system) - end][:, torch.from_numpy(student.o200k_ids.astype(np.int64))]
            top = inside.topk(K)
            np.testing.assert_allclose(document.annotations["teacher_log_p"][places], top.values, atol=1e-4)
            assert (document.annotations["teacher_ids"][places] == top.indices.numpy()).mean() > 0.99
            assert (document.annotations["teacher_ids"][places] != NO_RECORD).all()
