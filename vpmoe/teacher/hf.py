"""A teacher that ``transformers`` knows: a local ``AutoModelForCausalLM`` directory, such as GPT-OSS.

What does not fit into memory stays on disk: accelerate reads the decoder layer that is at work and lets it go
(embeddings, last norm and head stay). It reads the safetensors files themselves, or where they hold another form than
is computed in (MXFP4 of GPT-OSS, experts one by one), files in TMPDIR that are as large as the model in its dtype. A
pass reads every such layer once, so batches are to be large then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vpmoe.files import sha256_of_file, sha256_of_json
from megatron_vpmoe.runtime.device import current_device
from vpmoe.errors import DataError, WeightsError
from vpmoe.eval.open_model import read_tokenizer, require_folder
from vpmoe.teacher.interface import Answer, Conversation, Question, batches
from vpmoe.teacher.megatron import answers
from vpmoe.tokenizer import Tokenizer

_PROBED = 32
_DTYPES = {None: "auto", True: torch.bfloat16, False: torch.float32}


class HFTeacher:
    """See ``Teacher``. Conversations lie in rows of their own, padded on the right.

    Args:
        path: holds ``config.json``, safetensors and ``tokenizer.json``.
        bf16: compute in bfloat16 or in fp32; None: as the weights are saved.
        device: such as ``cuda:1``; None: the one that this process computes on.
        memory_gb: of decoder layers that are kept; None: all.
        tokens: of a batch, padding counted.

    Raises:
        CheckpointError, WeightsError, TokenizerError: no such model, or no vocabulary with it.
    """

    def __init__(
        self, path: Path, *, bf16: bool | None, device: str | None, memory_gb: float | None, tokens: int
    ) -> None:
        from transformers import AutoConfig

        require_folder(path)
        self._path, self._dtype, self._tokens = path, _DTYPES[bf16], tokens
        self._device, self._memory = device, memory_gb
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            what = f"there is no such device: {str(error).splitlines()[0]}"
            raise DataError(
                what, source=f"--device {device}", remedy="leave it out, or name one such as cuda:0"
            ) from error
        try:
            self._config = AutoConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise WeightsError(f"transformers opens no model here: {error}", source=str(path)) from error
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise WeightsError("there are no safetensors", source=str(path), remedy="save the model in that form")
        self.tokenizer: Tokenizer | None = read_tokenizer(path, self._config.get_text_config().vocab_size)
        self.identity: dict[str, Any] = {
            "by": "hf",
            "weights_sha256": sha256_of_json([sha256_of_file(file) for file in files]),
            "config_sha256": sha256_of_file(path / "config.json"),
            "dtype": str(self._dtype),
            "batch_tokens": tokens,
        }
        self.told: dict[str, Any] = {"name": path.name}

    def batches(self, conversations: Iterable[Conversation]) -> Iterator[Sequence[Conversation]]:
        """What is scored together."""
        return batches(conversations, self._tokens, padded=True)

    @contextmanager
    def open(self, question: Question, student: Tokenizer | None) -> Iterator[_Scorer]:
        """See ``Teacher``."""
        from transformers import AutoModelForCausalLM

        device = torch.device(self._device or current_device())
        how: dict[str, Any] = {"dtype": self._dtype, "local_files_only": True}
        # Weights that are saved in another form than they are computed in are written here once, layer by layer.
        with TemporaryDirectory(prefix="vpmoe_layers_") as folder:
            if self._memory is not None:
                how |= {"device_map": self._places(str(device)), "offload_folder": folder}
            try:
                model = AutoModelForCausalLM.from_pretrained(self._path, **how).eval()
            except (OSError, ValueError) as error:
                raise WeightsError(f"transformers loads no model here: {error}", source=str(self._path)) from error
            if self._memory is None:
                nn.Module.to(model, device)
            yield _Scorer(model, device, question, self)

    def _places(self, device: str) -> dict[str, Any]:
        """Module -> device, or ``disk`` for the decoder layers behind those that memory holds."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(self._config)
        depth = self._config.get_text_config().num_hidden_layers
        stacks = [
            name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth
        ]
        if len(stacks) != 1:
            raise WeightsError(
                f"it has {len(stacks)} stacks of {depth} layers, so it is not known what to read layer by layer",
                source=str(self._path),
                remedy="leave out --memory-gb",
            )
        left, places = (self._memory or 0) * 1e9, {}
        saved = self._config.get_text_config().dtype
        dtype = self._dtype if isinstance(self._dtype, torch.dtype) else saved
        width = (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize

        def place(prefix: str, module: nn.Module) -> None:
            nonlocal left
            for name, child in module.named_children():
                whole = f"{prefix}{name}"
                if whole == stacks[0]:
                    for number, layer in enumerate(child.children()):
                        left -= width * sum(parameter.numel() for parameter in layer.parameters())
                        places[f"{whole}.{number}"] = device if left >= 0 else "disk"
                elif stacks[0].startswith(f"{whole}."):
                    place(f"{whole}.", child)
                else:
                    places[whole] = device

        place("", model)
        return places


class _Scorer:
    def __init__(self, model: Any, device: torch.device, question: Question, teacher: HFTeacher) -> None:
        self._model, self._device, self._question, self._teacher = model, device, question, teacher
        self._probed = False

    def score(self, conversations: Iterable[Conversation]) -> Iterator[list[Answer]]:
        """See ``Scorer``."""
        for batch in self._teacher.batches(conversations):
            yield self._answers(batch)

    @torch.no_grad()
    def _answers(self, conversations: Sequence[Conversation]) -> list[Answer]:
        longest = max(len(each.tokens) for each in conversations)
        ids = torch.zeros(len(conversations), longest, dtype=torch.int64)
        real, asked = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (tokens, positions, _) in enumerate(conversations):
            ids[row, : len(tokens)] = torch.from_numpy(tokens)
            real[row, : len(tokens)], asked[row, torch.from_numpy(positions)] = 1, True
        ids, real = ids.to(self._device), real.to(self._device)
        hidden = self._model.base_model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        projection = self._model.get_output_embeddings().weight
        if not self._probed:
            self._probe(ids[:1, : min(_PROBED, len(conversations[0].tokens))], projection)
        return answers(hidden[asked.to(hidden.device)], projection, self._question, conversations)

    def _probe(self, ids: Tensor, projection: Tensor) -> None:
        """Refuse a model that makes more of its hidden states than logits = hidden · projectionᵀ."""
        self._probed = True
        hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        theirs = self._model(input_ids=ids, use_cache=False).logits.float()
        ours = (hidden @ projection.t()).float()
        if ours.shape != theirs.shape or (ours - theirs).norm() > 0.02 * theirs.norm():
            raise DataError(
                "its logits are not its last hidden states times its output embedding (a bias, scale or cap?)",
                source=self._teacher.told["name"],
                remedy="serve it (vLLM, SGLang) and give the server's address",
            )
