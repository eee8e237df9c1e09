"""``vpmoe nano-moe``: a story model from nothing: vocabulary, token files, pretraining, SFT, DPO, evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_vpmoe.config import load_config
from megatron_vpmoe.files import sha256_of_file, write_atomically
from vpmoe.commands import Command
from vpmoe.eval.suites.stories import VERSION as STORIES_VERSION
from vpmoe.eval.suites.text import VERSION as TEXT_VERSION
from vpmoe.quickstart.proof import Proof
from vpmoe.quickstart.run import verdict
from vpmoe.quickstart.runner import Runner, say
from vpmoe.quickstart.settings import Options, StorySettings, read_settings
from vpmoe.quickstart.trained import EVALUATION, Files, TrainedRun, dataset_sha256, flags, hashes, making
from vpmoe.steps import Step

DOES = {
    "environment": "looks at the installed packages",
    "stories": "writes stories, stories to order, and pairs of a right and a wrong protagonist",
    "tokenizer": "learns a byte-level BPE from the stories, with Harmony's tokens",
    "data": "makes token files of all three",
    "pretrain": "trains on the stories alone",
    "sft": "goes on with prompts and the stories that keep to them",
    "dpo": "goes on with the pairs",
    "evaluate": "has all three write stories to held-out prompts; how well held-out stories are foretold",
    "plots": "draws the trainings of the first seed, and what its models do over a few prompts",
}
HELD_OUT = "test.jsonl"
"""Of stories to order: what no training sees."""


@dataclass(frozen=True)
class StoryRuns:
    """The trainings of one seed, each from the weights of the one before.

    Attributes:
        folder: of the data, relative to where commands run.
    """

    proof: Proof[StorySettings]
    folder: Path
    seed: int
    pretrain: TrainedRun
    sft: TrainedRun
    dpo: TrainedRun

    @classmethod
    def of(cls, proof: Proof[StorySettings], seed: int) -> StoryRuns:
        """All three."""
        settings, folder = proof.settings, Path("data") / proof.name
        place = {part: ("--data-path", str(folder / part)) for part in ("pretrain", "sft", "dpo")}
        pretrain = proof.training("pretrain", seed, settings.pretrain, *place["pretrain"])
        start = ("--load-weights", str(pretrain.run))
        sft = proof.training("sft", seed, settings.sft, *place["sft"], *start)
        start = ("--load-weights", str(sft.run), "--reference-weights", str(sft.run))
        return cls(proof, folder, seed, pretrain, sft, proof.training("dpo", seed, settings.dpo, *place["dpo"], *start))

    @property
    def parts(self) -> Mapping[str, TrainedRun]:
        """By the names of their steps."""
        return {"pretrain": self.pretrain, "sft": self.sft, "dpo": self.dpo}

    @property
    def prompts(self) -> Path:
        """The held-out ones, relative to where commands run."""
        return self.folder / "prompts" / HELD_OUT

    def preparing(self) -> Iterator[tuple[str, Step, Command]]:
        """The commands that make the data, in their order, each with the step it belongs to; seeds do not count."""
        settings, folder = self.proof.settings, self.folder
        vocabulary = folder / "tokenizer"
        rows = {"pretrain": folder / "stories", "sft": folder / "prompts", "dpo": folder / "pairs"}
        yield self._made("stories", "stories", ("data", "stories"), rows["pretrain"], settings.stories)
        yield self._made("stories", "story_prompts", ("data", "story-prompts"), rows["sft"], settings.prompts)
        yield self._made("stories", "story_pairs", ("data", "story-prompts", "--pairs"), rows["dpo"], settings.pairs)
        size = self.pretrain.cfg.model.padded_vocab_size
        learned = {"input": str(rows["pretrain"]), "split_field": "split", "vocab_size": size, **settings.tokenizer}
        yield self._made("tokenizer", "bpe", ("tokenizer", "train"), vocabulary, learned)
        kinds = {"pretrain": ("text", "build-text"), "sft": ("chat", "build-chat"), "dpo": ("pairs", "build-pairs")}
        for part, (kind, verb) in kinds.items():
            cfg = self.parts[part].cfg
            built = {"input": str(rows[part]), "id_field": "id", "split_field": "split", "tokenizer": str(vocabulary)}
            built |= {"padded_vocab_size": size, "seq_len": cfg.data.seq_length}
            built |= {} if part == "pretrain" else {"ignore_fields": "constraints"}
            yield self._made("data", kind, ("data", verb), self.parts[part].dataset, built)

    def evaluating(self, part: str, trained: Files) -> tuple[Step, Command]:
        """Stories to held-out prompts; of the pretrained model as passages to go on with."""
        run, options = self.parts[part], {"passage": part == "pretrain", **self.proof.settings.evaluation}
        step = Step(
            kind="stories_evaluation",
            version=STORIES_VERSION,
            output=(run.work / run.evaluation).parent,
            decides={
                "checkpoint": hashes(trained),
                "prompts": sha256_of_file(run.work / self.prompts),
                "options": {name: value for name, value in options.items() if name != "batch_size"},
            },
            packages=("torch",),
        )
        asked: Options = {"prompts": str(self.prompts), **options}
        return step, Command(("vpmoe", "eval", "stories", str(run.run), *flags(asked)))

    @property
    def likelihood(self) -> Path:
        """The report on the perplexity of held-out stories."""
        return self.pretrain.run / "likelihood" / EVALUATION

    def foretelling(self, trained: Files) -> tuple[Step, Command]:
        """The perplexity of the stories of the split valid."""
        run = self.pretrain
        step = Step(
            kind="stories_likelihood",
            version=TEXT_VERSION,
            output=(run.work / self.likelihood).parent,
            decides={"checkpoint": hashes(trained), "dataset": dataset_sha256(run.work / run.dataset)},
            packages=("torch",),
        )
        return step, Command(("vpmoe", "eval", "text", str(run.run), "--data-path", str(run.dataset)))

    def drawing(self, trained: Iterable[Files]) -> Step:
        """The figures of the trainings and their models; each seed's stay."""
        decides = {
            "checkpoints": [hashes(files) for files in trained],
            "prompts": sha256_of_file(self.proof.work / self.prompts),
            "options": self.proof.settings.figures.model_dump(),
        }
        output = self.proof.work / "reports" / self.proof.name / f"figs_{self.seed}"
        return Step("stories_figures", 2, output, decides, packages=("matplotlib",))

    def draw(self, folder: Path) -> Command:
        """The command that draws them into ``folder``, where their prompts come too: the first that are held out."""
        figures, work = self.proof.settings.figures, self.proof.work
        asked = folder / "prompts.jsonl"
        with (work / self.prompts).open() as lines:
            write_atomically(asked, "".join(islice(lines, figures.prompts)).encode())
        places = {"prompts": asked, "output_dir": folder}
        options = {name: os.path.relpath(place, work) for name, place in places.items()}
        runs = [str(run.run) for run in self.parts.values()]
        words = flags({**options, "passage": runs[0], "max_new_tokens": figures.max_new_tokens})
        return Command(("vpmoe", "make-plots", *runs, *words))

    def _made(
        self, name: str, kind: str, words: tuple[str, ...], output: Path, options: Mapping[str, object]
    ) -> tuple[str, Step, Command]:
        proof = self.proof
        return name, *making(proof.work, kind, (*words, *flags(options)), output, overwrite=proof.overwrite)


def plan_of(
    root: Path,
    *,
    full: bool = False,
    seeds: Sequence[int] = (),
    force: Sequence[str] = (),
    overwrite: bool = False,
    work_dir: Path | None = None,
    settings: Path | None = None,
) -> Proof[StorySettings]:
    """What the command line asks for in the checkout ``root``; no seeds: the configuration's.

    Args:
        full: the full budget, whose data, runs and report have names of their own.

    Raises:
        QuickstartError: an unknown step to force, a seed twice, or unusable settings.
        ConfigError: a training configuration that cannot be.
    """
    name = "nano_moe_full" if full else "nano_moe"
    own = root / "configs" / "nano_moe" / ("pipeline_full.toml" if full else "pipeline.toml")
    read = read_settings(settings or own, StorySettings)
    chosen = tuple(seeds) or (load_config(os.path.relpath(root / read.pretrain.config)).training.seed,)
    exempt = f"--settings {settings}" if settings else None
    work = Path(os.path.realpath(work_dir or root))
    return Proof(name, DOES, root, work, read, chosen, tuple(force), overwrite, exempt)


def run_nano_moe(proof: Proof[StorySettings]) -> int:
    """Do the steps, and those after the data for each seed; returns 0, or 1 below a target that binds.

    Raises:
        VpmoeError: whatever stops a step; its ``exit_code`` is that of the command that failed or of the signal.
    """
    from vpmoe.quickstart.stories_report import write_stories_report

    classes = [StoryRuns.of(proof, seed) for seed in proof.seeds]
    runner, announced = proof.runner(), ""
    for name, step, command in classes[0].preparing():
        if name != announced:
            runner.announce(announced := name)
        runner.keyed(name, step, command)
    trained = []
    for runs in classes:
        say(f"\nseed {runs.seed}")
        trained.append(_of_seed(runs, runner))
    runner.announce("plots")
    runner.folder("plots", classes[0].drawing(trained[0].values()), classes[0].draw)
    report = write_stories_report(proof, classes, runner.seconds)
    return verdict(report["targets"], proof.exempt)


def _of_seed(runs: StoryRuns, runner: Runner) -> dict[str, Files]:
    trained: dict[str, Files] = {}
    start = None
    for part, run in runs.parts.items():
        runner.announce(part)
        start = trained[part] = runner.train(part, run, start)
    runner.announce("evaluate")
    runner.evaluate("evaluate", runs.foretelling(trained["pretrain"]))
    for part, files in trained.items():
        runner.evaluate("evaluate", runs.evaluating(part, files))
    return trained
