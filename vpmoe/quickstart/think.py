"""``vpmoe think-nano``: experts of three kinds, a mixture of them, and each expert that goes on alone as long.

The transformer is trained first, since its embedding is that of all; then the state space model and the diffuser; then
router, latent attention and adapters with all three frozen, without a store of vectors and with one. For as many
tokens, and from the same weights, the two language models go on alone: what the mixture is held against.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vpmoe.config import load_config
from vpmoe.commands import Command
from vpmoe.quickstart.plan import SETTINGS as QUICKSTART
from vpmoe.quickstart.plan import Plan
from vpmoe.quickstart.proof import Proof
from vpmoe.quickstart.runner import PREPARING, Runner, say
from vpmoe.quickstart.settings import ThinkSettings, Training, read_settings
from vpmoe.quickstart.trained import Files, TrainedRun, dataset_sha256, flags, hashes
from vpmoe.steps import Step, read_receipt

NAME = "think_nano"
DOES = {
    **PREPARING,
    "data": "makes rows, conversations and token files of five domains, with one vocabulary",
    "transformer": "trains the transformer expert and the embedding of all (phase 6a)",
    "state_space": "trains the state space expert over that embedding (phase 6c)",
    "diffuser": "trains the diffuser over that embedding (phase 6b)",
    "store": "writes a vector of each chunk of the training documents into a store",
    "mixture": "trains router, latent attention and adapters alone (phase 7), without the store and with it",
    "alone": "has the transformer and the state space expert go on alone for the tokens of phase 7",
}
LANGUAGE_MODELS = ("transformer", "state_space")
"""Experts that have a likelihood of their own."""
EXPERTS = (*LANGUAGE_MODELS, "diffuser")
_VOCABULARY, _STORE = "vocabulary", "chunks.store"


@dataclass(frozen=True)
class ThinkRuns:
    """The trainings of one seed.

    Attributes:
        experts: by the names of their steps, in the order of training.
        full: the mixture of all experts that reads the store.
        storeless: the one that does not.
        alone: the language models going on from their weights, by expert.
    """

    proof: Proof[ThinkSettings]
    seed: int
    experts: Mapping[str, TrainedRun]
    storeless: TrainedRun
    full: TrainedRun
    alone: Mapping[str, TrainedRun]

    @classmethod
    def of(cls, proof: Proof[ThinkSettings], seed: int) -> ThinkRuns:
        """All of them, on the blend of all domains."""
        settings = proof.settings
        parts = (f"{{path: {_place(name) / 'dataset'}, weight: 1, name: {name}}}" for name in settings.domains)
        blend = ("--data-path", "null", "--blend", f"[{', '.join(parts)}]")
        stages = {name: getattr(settings, name) for name in EXPERTS}
        transformer = proof.training("transformer", seed, settings.transformer, *blend)
        shared = ("--load-embedding", str(transformer.run))
        experts = {"transformer": transformer} | {
            name: proof.training(name, seed, stages[name], *blend, *shared) for name in EXPERTS[1:]
        }
        loaded = ("--load-experts", f"[{', '.join(str(run.run) for run in experts.values())}]")
        storeless = proof.training("storeless", seed, settings.mixture, *blend, *loaded)
        reading = ("--store", str(_store(seed) / _STORE), "--memory-entries", str(settings.memory_entries))
        full = proof.training("full", seed, settings.mixture, *blend, *loaded, *reading)
        budget = {name: getattr(full.cfg.training, name) for name in ("train_iters", "global_batch_size")}
        alone = {}
        for name in LANGUAGE_MODELS:
            start = ("--load-embedding", "null", "--load-weights", str(experts[name].run))
            alone[name] = proof.training(f"{name}_alone", seed, stages[name], *blend, *start, **budget)
        return cls(proof, seed, experts, storeless, full, alone)

    @property
    def parts(self) -> Mapping[str, TrainedRun]:
        """By name."""
        alone = {f"{name}_alone": run for name, run in self.alone.items()}
        return {**self.experts, "storeless": self.storeless, "full": self.full, **alone}

    def storing(self, trained: Files) -> Step:
        """The store of this seed's embedding, of the transformer with files ``trained``."""
        work, parts = self.proof.work, self.full.cfg.data.parts
        decides = {
            "embedding": hashes(trained),
            "datasets": [dataset_sha256(work / part.path) for part in parts],
            "options": self.proof.settings.store,
        }
        return Step("think_store", 1, work / _store(self.seed), decides, packages=("faiss-cpu",))

    def store(self, folder: Path) -> Command:
        """The command that makes it in ``folder``, which is all the step's own: an attempt may have left one there."""
        datasets = [part.path for part in self.full.cfg.data.parts]
        output = os.path.relpath(folder / _STORE, self.proof.work)
        places = {"embedding": str(self.experts["transformer"].run), "output": output, "overwrite": True}
        options = {**places, **self.proof.settings.store}
        return Command(("vpmoe", "data", "build-store", *datasets, *flags(options)))


def corpora(proof: Proof[ThinkSettings]) -> Iterator[Plan]:
    """What makes the data: of all domains together, which gives the vocabulary, then of each."""
    settings, quickstart = proof.settings, read_settings(proof.root / QUICKSTART)
    shares = [
        {family: weight / sum(mix.values()) for family, weight in mix.items()} for mix in settings.domains.values()
    ]
    together = {family: sum(mix.get(family, 0.0) for mix in shares) for one in shares for family in one}
    own = {name: value for name, value in quickstart.dataset.items() if name != "compact_vocab_size"}
    own["compact_map"] = str(_place(_VOCABULARY) / "dataset" / "compact_vocab.npy")
    training = Training(config=settings.transformer.config, run_name=NAME)
    mixes = [(_VOCABULARY, together, quickstart.dataset), *((*each, own) for each in settings.domains.items())]
    for name, mix, dataset in mixes:
        rows = {**quickstart.rows, **settings.rows, "families": mix}
        changed = {"rows": rows, "dataset": {**dataset, **settings.dataset}, "training": training}
        yield Plan.of(
            proof.root,
            overwrite=proof.overwrite,
            work_dir=proof.work,
            settings=quickstart.model_copy(update=changed),
            data=_place(name),
        )


def plan_of(
    root: Path,
    *,
    seeds: Sequence[int] = (),
    force: Sequence[str] = (),
    overwrite: bool = False,
    work_dir: Path | None = None,
    settings: Path | None = None,
) -> Proof[ThinkSettings]:
    """What the command line asks for in the checkout ``root``; no seeds: the configuration's.

    Raises:
        QuickstartError: an unknown step to force, a seed twice, or unusable settings.
        ConfigError: a training configuration that cannot be.
    """
    read = read_settings(settings or root / "configs" / "think" / "nano" / "pipeline.toml", ThinkSettings)
    chosen = tuple(seeds) or (load_config(os.path.relpath(root / read.transformer.config)).training.seed,)
    work = Path(os.path.realpath(work_dir or root))
    return Proof(NAME, DOES, root, work, read, chosen, tuple(force), overwrite, exempt=None)


def run_think_nano(proof: Proof[ThinkSettings]) -> int:
    """Do the steps, and those after the data for each seed; returns 0: the report says what helps, and binds nobody.

    Raises:
        VpmoeError: whatever stops a step; its ``exit_code`` is that of the command that failed or of the signal.
    """
    from vpmoe.quickstart.think_report import write_think_report

    classes = [ThinkRuns.of(proof, seed) for seed in proof.seeds]
    runner = proof.runner()
    runner.prepare(*corpora(proof))
    for runs in classes:
        say(f"\nseed {runs.seed}")
        _of_seed(runs, runner)
    write_think_report(proof, classes, runner.seconds)
    return 0


def _of_seed(runs: ThinkRuns, runner: Runner) -> None:
    files: dict[str, Files] = {}
    for name, run in runs.experts.items():
        runner.announce(name)
        files[name] = runner.train(name, run, files.get("transformer"))
    runner.announce("store")
    stored = runs.storing(files["transformer"])
    runner.folder("store", stored, runs.store)
    runner.announce("mixture")
    # Of the experts the weights decide: none of them is trained here.
    frozen = {f"{name}/{file}": entry for name, each in files.items() for file, entry in each.items()}
    runner.train("mixture", runs.storeless, frozen)
    store = {f"store/{file}": entry for file, entry in read_receipt(stored.output)["files"].items()}
    runner.train("mixture", runs.full, {**frozen, **store})
    runner.announce("alone")
    for name, run in runs.alone.items():
        runner.train("alone", run, files[name])


def _place(name: str) -> Path:
    """Of a corpus, relative to where commands run."""
    return Path("data") / NAME / name


def _store(seed: int) -> Path:
    return _place(f"store_{seed}")
