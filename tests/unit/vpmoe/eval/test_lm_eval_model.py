"""Our model of lm-eval: log-likelihoods as plain passes give them, cut and windowed as lm-eval's own model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vpmoe.errors import DataError

pytestmark = pytest.mark.slow


def test_likelihoods_and_generation(run_directory: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from megatron_vpmoe.model.attention.masks import left_padded
    from vpmoe.eval.open_model import open_model
    from vpmoe.eval.suites.lm_eval_model import VpmoeLM

    assert get_model("vpmoe") is VpmoeLM
    for arguments, fault in (("colour=1", "colour=1 is no argument"), ("context=x", "context='x'"), ("", "no model")):
        with pytest.raises(DataError, match=fault):
            VpmoeLM.create_from_arg_string(arguments, {"device": None})
    with pytest.raises(DataError, match="batch_size='auto'"):
        VpmoeLM.create_from_arg_obj({"pretrained": str(run_directory)}, {"batch_size": "auto", "device": "cuda:0"})

    def instances(kind: str, arguments: list[tuple]) -> list:
        return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]

    with open_model(run_directory) as opened, torch.no_grad():
        encode = opened.tokenizer.encode_ordinary

        def log_p(before: list[int], after: list[int]) -> tuple[float, bool]:
            ids = [*before, *after]
            table = opened.model(*left_padded([ids[:-1]], opened.model.device)).logits()[0].double().log_softmax(-1)
            rows = table[len(before) - 1 :]
            return float(rows[range(len(after)), after].sum()), rows.argmax(-1).tolist() == after

        options = {"batch_size": "3", "device": "cuda:0"}
        lm = VpmoeLM.create_from_arg_string(f"pretrained={run_directory},context=24", options)
        pairs = [("What is 1 + 2? ", "It is 3"), ("", "Three"), ("a" * 40, " and b")]
        for (context, continuation), found in zip(
            pairs, lm.loglikelihood(instances("loglikelihood", pairs)), strict=True
        ):
            whole = encode(context + continuation).tolist()
            before = encode(context.rstrip()).tolist()
            ids = [*(before or [opened.tokenizer.eod_id]), *whole[len(before) :]]
            after = len(whole) - len(before)
            ids = ids[-25:]
            expected = log_p(ids[:-after], ids[-after:])
            assert found == (pytest.approx(expected[0], abs=1e-4), expected[1])

        with pytest.raises(DataError, match="'' adds no token"):
            lm.loglikelihood(instances("loglikelihood", [("One", "")]))

        texts = [("One and two are three. " * 4,), ("",), ("x",)]
        rolling = lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
        first = encode(texts[0][0]).tolist()
        assert len(first) > 48
        total = log_p([opened.tokenizer.eod_id], first[:24])[0]
        for begin in range(24, len(first), 24):
            end = min(begin + 24, len(first))
            total += log_p(first[end - 25 : begin], first[begin:end])[0]
        last = log_p([opened.tokenizer.eod_id], encode("x").tolist())[0]
        assert rolling == pytest.approx([total, 0.0, last], abs=1e-4)

        free = {"until": [], "max_gen_toks": 12}
        (text,) = lm.generate_until(instances("generate_until", [("What is", free)]))
        assert text
        stop = text[len(text) // 2]
        asked = [("What is", free), ("What is", {**free, "until": [stop]})]
        assert lm.generate_until(instances("generate_until", asked)) == [text, text[: text.index(stop)]]
