"""``vpmoe rl-nano``: a model short of mastery, and what rewards (GRPO) and preferences (DPO) make of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vpmoe.commands import Command
from vpmoe.eval.pairs import PAIRS_NAME
from vpmoe.quickstart.plan import Plan
from vpmoe.quickstart.proof import QuestionProof
from vpmoe.quickstart.run import verdict
from vpmoe.quickstart.runner import Runner, say
from vpmoe.quickstart.settings import RlSettings
from vpmoe.quickstart.trained import Files, QuestionedRun, flags, making
from vpmoe.steps import Step

NAME = "rl_nano"
DOES = {
    "sft": "trains a nano vpMoE short of mastery, and evaluates it",
    "grpo": "goes on from it with rewards for exact answers, and evaluates that",
    "pairs": "asks it questions; its wrong answers against the right ones are preference pairs",
    "dpo": "goes on from it with those, and evaluates that",
}


@dataclass(frozen=True)
class SeedPlan:
    """The runs of one seed.

    Attributes:
        answers: folder of the pairs as rows.
        settings: for ``vpmoe eval pairs``.
    """

    seed: int
    sft: QuestionedRun
    grpo: QuestionedRun
    dpo: QuestionedRun
    answers: Path
    data: Plan
    settings: RlSettings

    @classmethod
    def of(cls, proof: QuestionProof[RlSettings], seed: int) -> SeedPlan:
        """The three runs and the pairs, all of this seed."""
        settings, data = proof.settings, proof.data
        place = ("--data-path", str(data.dataset))
        sft = proof.run("sft", seed, settings.sft, *place)
        start, pairs = str(sft.run), str(data.data / f"pairs_{seed}")
        return cls(
            seed,
            sft,
            proof.run("grpo", seed, settings.grpo, *place, "--rollout-seed", str(seed), "--load-weights", start),
            proof.run(
                "dpo", seed, settings.dpo, "--data-path", pairs, "--load-weights", start, "--reference-weights", start
            ),
            data.data / f"answers_{seed}",
            data,
            settings,
        )

    def pairs(self) -> list[tuple[Step, Command]]:
        """The commands that make the preference dataset, in their order; the steps are theirs."""
        dataset = self.sft.dataset
        split = {"valid_fraction": self.data.settings.dataset["valid_fraction"]}
        asked = {"rows": str(self.data.rows), **split, **self.settings.pairs}
        built = {"input": str(self.answers / PAIRS_NAME), "id_field": "synth_id", **split}
        built |= {"compact_map": str(dataset / "compact_vocab.npy"), "prompts_of": str(dataset)}
        built |= {"padded_vocab_size": self.dpo.cfg.model.padded_vocab_size, "seq_len": self.dpo.cfg.data.seq_length}
        commands = (
            ("own_pairs", ("eval", "pairs", str(self.sft.run)), self.answers, asked),
            ("pairs", ("data", "build-pairs"), self.dpo.dataset, built),
        )
        return [
            making(self.data.work, kind, (*verb, *flags(options)), output, overwrite=self.data.overwrite)
            for kind, verb, output, options in commands
        ]


def plan_of(root: Path, **wishes: Any) -> QuestionProof[RlSettings]:
    """What the command line asks for; see ``QuestionProof.of``."""
    return QuestionProof.of(root, NAME, RlSettings, DOES, **wishes)


def run_rl_nano(proof: QuestionProof[RlSettings]) -> int:
    """Do the steps, and those after the data for each seed; returns 0, or 1 below a target that binds.

    Raises:
        VpmoeError: whatever stops a step; its ``exit_code`` is that of the command that failed or of the signal.
    """
    from vpmoe.quickstart.rl_report import write_rl_report

    plans = [SeedPlan.of(proof, seed) for seed in proof.seeds]
    runner = proof.begin()
    for one in plans:
        say(f"\nseed {one.seed}")
        _of_seed(one, runner)
    report = write_rl_report(proof, plans, runner.seconds)
    return verdict(report["targets"], proof.exempt)


def _of_seed(plan: SeedPlan, runner: Runner) -> None:
    def trained(name: str, run: QuestionedRun, start: Files | None = None) -> Files:
        runner.announce(name)
        files = runner.train(name, run, start)
        runner.evaluate(name, run.evaluating(files))
        return files

    from_start = partial(trained, start=trained("sft", plan.sft))
    from_start("grpo", plan.grpo)
    runner.announce("pairs")
    for step, command in plan.pairs():
        runner.keyed("pairs", step, command)
    from_start("dpo", plan.dpo)
