"""A matrix of variants → the runs of a study, all options resolved and checked before any run begins."""

import json
import math
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from moepp.model import InputError, MoEConfig, TransformerConfig, hidden_flops_per_token, training_flops_per_token
from moepp.system.files import read_yaml
from moepp.training import lightning_cli
from moepp.training.budget import BudgetConfig, calibration_tokens
from moepp.training.checkpoint import configs_in, step_path
from moepp.training.start import described_in

PLOTS = ("curves", "tau", "constants", "compute", "frontier")
# of the values of a matrix, and of its `quick` and `tune`, which take the place of the matrix's own
VERSION_TYPES = {"base": str, "start": str, "seeds": int, "jobs": int}
TUNE_TYPES = VERSION_TYPES | {"options": dict, "part_of_steps": (int, float), "seeds_of_a_try": int}
TYPES = VERSION_TYPES | {"reference": str, "quick": dict, "sources": dict, "tune": dict, "variants": dict}
# of a variant; all its other keys are options of the run
ENTRY_TYPES = {"paper": dict, "plots": list, "ffn_width": int, "noise": (int, float), "flops_of": str}


@dataclass(frozen=True)
class Variant:
    """One row of a study: a configuration and what the paper says of it."""

    name: str
    resolve: Callable[..., dict[str, Any]]  # **last → all options of `moepp fit`, not to be changed
    paper: dict[str, dict[str, float]] = field(default_factory=dict)  # quantity → model size → value
    plots: Sequence[str] = ()
    noise: float = 0.1  # of rows that conversion adds to the router (model/conversion.py)
    flops_of: str | None = None  # another variant, whose training costs as much
    further: dict[str, Any] = field(default_factory=dict)  # options that come last: {"model.optim.lr": 0.003}
    start: "Start | None" = None  # what its runs go on from

    def options_of(self, seed: int) -> dict[str, Any]:
        """Of the run of that seed, as in a recipe."""
        return self.resolve(**{"seed_everything": seed} | self.further)

    @property
    def options(self) -> dict[str, Any]:
        """Of seed 0: the seed aside, those of every run."""
        return self.options_of(0)

    def with_options(self, further: dict[str, Any]) -> "Variant":
        return replace(self, further=self.further | further)

    @cached_property  # a checkpoint may have to be read for it
    def transformer(self) -> TransformerConfig:
        model = self.options["model"]
        init_from = model["init_from"] if self.start is None else None  # its start need not be there yet
        vocab_size = lightning_cli.model_vocab_size(self.options["data"]["vocab_size"], init_from, None)
        return TransformerConfig(**model["transformer"] | {"vocab_size": vocab_size})

    @property
    def moe(self) -> MoEConfig:
        return MoEConfig(**self.options["model"]["moe"])

    @property
    def steps(self) -> int:
        return self.options["trainer"]["max_steps"]

    @property
    def devices(self) -> int:
        return self.options["trainer"]["devices"]

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of one run, on each device."""
        return self.steps * self.options["trainer"]["accumulate_grad_batches"]

    @property
    def tokens(self) -> int:
        """Training tokens of one run."""
        data = self.options["data"]
        return self.micro_batches * self.devices * data["batch_size"] * data["seq_len"]

    def training_flops_per_token(self, ffn_per_token: Any) -> Any:
        """Forward and backward, and forward through a teacher; of a number or of an array of numbers."""
        seq_len, teacher = self.options["data"]["seq_len"], self.options["model"]["distill"]["teacher"]
        configs = None
        if self.start is not None and teacher == str(self.start.checkpoint(0)):  # which need not be there yet
            configs = self.start.variant.transformer, self.start.variant.moe
        elif teacher is not None:
            configs = configs_in(described_in(teacher))
        return training_flops_per_token((self.transformer, self.moe), seq_len, ffn_per_token, configs)

    @property
    def calibration_flops_per_token(self) -> float:
        """Of reading training text again at the end, to set the budget by it (LitMoE.on_train_end)."""
        if self.moe.ffn_budget is None:
            return 0.0
        seq_len = self.options["data"]["seq_len"]
        return hidden_flops_per_token(self.transformer, self.moe, seq_len, self.moe.ffn_budget)

    @property
    def calibration_flops(self) -> float:
        return calibration_tokens(self.tokens) * self.calibration_flops_per_token

    def step_flops(self) -> float:
        """Of all steps of one run, with the FFN experts per token that theory expects."""
        budget, end = BudgetConfig(**self.options["model"]["budget"]), self.moe.expected_ffn_per_token
        ffn_per_token = fmean(budget.at(step, self.steps, end) for step in range(self.steps))
        return self.tokens * self.training_flops_per_token(ffn_per_token)

    def training_flops(self, steps: int | None = None) -> float:
        """Of one run, calibration's too; with other `steps` than its own, of which each would cost as much."""
        part = (steps or self.steps) / self.steps
        calibration = calibration_tokens(round(part * self.tokens)) * self.calibration_flops_per_token
        return part * self.step_flops() + calibration

    def training_time(self) -> float:
        """Of one run, in micro-batches: calibration takes as many as have its FLOPs."""
        return self.micro_batches * self.training_flops() / self.step_flops()


@dataclass(frozen=True)
class Run:
    """One variant trained from one seed, in a folder of its own."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def options(self) -> dict[str, Any]:
        """The recipe of this run, resolved from the files when first asked for: nothing is left to look up."""
        return self.variant.options_of(self.seed)

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").is_file()

    @property
    def result(self) -> dict[str, Any]:
        """What it has found, once it is finished."""
        return json.loads((self.folder / "result.json").read_text())

    @property
    def failure(self) -> str | None:
        """The last line of a run that failed."""
        path = self.folder / "failed.txt"
        return path.read_text().strip() if path.is_file() and not self.finished else None


@dataclass(frozen=True)
class Start:
    """A model that is trained from each seed first, and that every run of that seed goes on from.

    A variant with zero-computation experts starts from what `add_zero_computation` makes of it.
    """

    variant: Variant
    out: Path

    def run(self, seed: int) -> Run:
        return Run(self.variant, seed, self.out / "start" / f"seed{seed}")

    def checkpoint(self, seed: int, name: str | None = None) -> Path:
        """The trained model, or what the variant of that name starts from."""
        folder = self.run(seed).folder
        return step_path(folder, self.variant.steps) if name is None else folder / f"{name}.ckpt"


@dataclass(frozen=True)
class Matrix:
    """What is compared with what."""

    path: Path
    variants: list[Variant]
    reference: Variant
    sources: dict[str, str]  # quantity → what the paper's figure is and where it stands
    start: Start | None = None

    @property
    def devices(self) -> int:
        """Of the variant whose runs take most."""
        return max(variant.devices for variant in self.variants)

    def runs(self, seeds: int, out: Path) -> list[Run]:
        """All runs, seed by seed, so that an early look at a study finds every variant."""
        return [Run(v, seed, out / v.name / f"seed{seed}") for seed in range(seeds) for v in self.variants]


def read_matrix(path: Path) -> dict[str, Any]:
    """The YAML, its shape checked.

    Raises:
        InputError: missing, not YAML, or not a matrix.
    """
    if not path.is_file():
        raise InputError(f"matrix: {path} does not exist")
    matrix = read_yaml(path)
    if not isinstance(matrix, dict) or not isinstance(matrix.get("variants"), dict):
        raise InputError(f"{path}: is no matrix: it needs base, reference and variants, see recipes/compare.yaml")
    require_entries(matrix, TYPES, f"{path}:")
    if matrix.get("reference") not in matrix["variants"]:
        raise InputError(f"{path}: its reference {matrix.get('reference')!r} is none of its variants")
    variants = matrix["variants"] = {name: entry or {} for name, entry in matrix["variants"].items()}
    for name, entry in variants.items():
        is_file_name = isinstance(name, str) and name != "" and "\0" not in name and Path(name).name == name
        if not is_file_name or not isinstance(entry, dict):
            raise InputError(f"{path}: variant {name!r}: is no name with a mapping of options")
        where = f"{path}: variant {name}:"
        require_entries({key: entry[key] for key in ENTRY_TYPES if key in entry}, ENTRY_TYPES, where)
        for plot in entry.get("plots", []):
            if plot not in PLOTS:
                raise InputError(f"{where} no plot {plot!r}: use {', '.join(PLOTS)}")
        if entry.get("ffn_width", 1) < 1:
            raise InputError(f"{where} ffn_width: must be at least 1")
        for quantity, figures in entry.get("paper", {}).items():
            for figure in require_type(figures, dict, f"{where} paper.{quantity}").values():
                require_type(figure, (int, float), f"{where} paper.{quantity}")
    for name, entry in variants.items():
        if "flops_of" in entry and "flops_of" in variants.get(other := entry["flops_of"], ["flops_of"]):
            no_other = f"flops_of: {other!r} is no other variant with steps of its own"
            raise InputError(f"{path}: variant {name}: {no_other}")
    require_entries(matrix.get("quick", {}), VERSION_TYPES, f"{path}: quick:")
    if "tune" in matrix:
        require_entries(matrix["tune"], TUNE_TYPES, f"{path}: tune:")
        if not 0 < matrix["tune"].get("part_of_steps", 1) <= 1:
            raise InputError(f"{path}: tune.part_of_steps: must be above 0 and at most 1")
        options = require_type(matrix["tune"].get("options"), dict, f"{path}: tune.options")
        for option, values in options.items():
            numbers = require_type(values, list, f"{path}: tune.options: {option}")
            finite = all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
            if not isinstance(option, str) or not numbers or not finite or len(set(numbers)) < len(numbers):
                raise InputError(f"{path}: tune.options: {option}: is no option with a list of different numbers")
        if len({last_part(option) for option in options}) < len(options):
            raise InputError(f"{path}: tune.options: two end alike, and runs could not have folders of their own")
        if "start" in matrix:
            raise InputError(f"{path}: tune: a study that goes on from trained models has nothing to tune them by")
    return matrix


def require_entries(mapping: dict[str, Any], types: dict[str, Any], name: str) -> None:
    """Raise an InputError for a key that is none of `types`, and for a value of another type."""
    if unknown := {str(key) for key in mapping} - set(types):
        raise InputError(f"{name} unknown key {min(unknown)!r}: use {', '.join(sorted(types))}")
    for key, value in mapping.items():
        require_type(value, types[key], f"{name} {key}")


def last_part(option: str) -> str:
    """lr of model.optim.lr."""
    return option.rpartition(".")[2]


def require_type(value: Any, kind: Any, name: str) -> Any:
    """The value, or an InputError that it is of another type."""
    if not isinstance(value, kind):
        raise InputError(f"{name}: {value!r} is of the wrong type, see recipes/compare.yaml")
    return value


def resolve(path: Path, matrix: dict[str, Any], base: Path, overrides: list[str], out: Path) -> Matrix:
    """Each variant over `overrides` over `base`, every option checked as `moepp fit` checks it.

    `out` is the folder of the study.

    Raises:
        InputError: an option is wrong, or two variants are the same configuration.
    """
    start = None
    if "start" in matrix:
        recipe = path.parent / matrix["start"]
        start = Start(Variant("start", cache(partial(fit_options, recipe, overrides, {}, None, "start"))), out)
    variants: dict[str, Variant] = {}
    for name, entry in matrix["variants"].items():
        # a fifth of a second each, and a search asks for the same ones again
        options = cache(partial(fit_options, base, overrides, entry, start, name))
        own = {key: entry[key] for key in ("paper", "plots", "noise", "flops_of") if key in entry}
        variant = Variant(name, options, start=start, **own)
        try:
            _ = variant.transformer, variant.moe  # their constructors refuse impossible values
        except InputError as error:
            raise InputError(f"{path}: variant {name}: {error}") from error
        variants[name] = variant
    variants = with_equal_flops(variants)
    for one, two in combinations(variants.values(), 2):
        if one.options == two.options and one.flops_of == two.flops_of:
            raise InputError(f"{path}: variants {one.name} and {two.name} are the same configuration")
    reference = variants[matrix["reference"]]
    return Matrix(path, list(variants.values()), reference, matrix.get("sources", {}), start)


def with_equal_flops(variants: dict[str, Variant]) -> dict[str, Variant]:
    """Those with a `flops_of` trained for as many steps as cost no more than what that one's training costs."""
    found = {}
    for name, own in variants.items():
        if own.flops_of is not None:
            target = variants[own.flops_of].training_flops() * (1 + 1e-9)  # sums may be rounded
            most = math.ceil(own.steps * target / own.step_flops())
            steps = bisect_right(range(1, most + 1), target, key=own.training_flops)
            own = own.with_options({"trainer.max_steps": max(1, steps)})
        found[name] = own
    return found


def fit_options(
    base: Path, overrides: list[str], entry: dict[str, Any], start: Start | None, name: str, **last: Any
) -> dict[str, Any]:
    """What `moepp fit` would run with for a matrix's `entry` of that name; later arguments win."""
    if not base.is_file():
        raise InputError(f"base: {base} does not exist")
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "variant.yaml"
        recipe.write_text(yaml.safe_dump({key: value for key, value in entry.items() if key not in ENTRY_TYPES}))
        chosen = [f"--{option}={value}" for option, value in last.items()]
        try:
            options = lightning_cli.resolve(["--config", str(base), *overrides, "--config", str(recipe), *chosen])
        except InputError as error:  # the caller names the variant
            raise InputError(str(error).removesuffix(f", in {recipe.resolve()}")) from error
    del options["base"]  # resolved
    trainer = options["trainer"]
    for key, section in (("ckpt_path", options), ("trainer.default_root_dir", trainer)):
        if (value := section.pop(key.removeprefix("trainer."))) is not None:
            raise InputError(f"{key}: a study gives each run its own, so {value} cannot be set")
    if start is not None:
        seed, vanilla = options["seed_everything"], not MoEConfig(**options["model"]["moe"]).n_zero_computation
        options["model"]["init_from"] = str(start.checkpoint(seed, None if vanilla else name))
        if options["model"]["distill"]["teacher"] == "start":
            options["model"]["distill"]["teacher"] = str(start.checkpoint(seed))
    options["model"]["transformer"]["intermediate_size"] *= entry.get("ffn_width", 1)
    # auto: the same run on any machine; more GPUs take more runs at once
    devices = "1" if trainer["devices"] == "auto" else str(trainer["devices"])
    if not devices.isdecimal() or int(devices) < 1:
        raise InputError(f"trainer.devices: a study needs a number of devices, got {devices}")
    trainer["devices"] = int(devices)
    if trainer["max_steps"] < 1:
        raise InputError(f"trainer.max_steps: a study needs a number of steps, got {trainer['max_steps']}")
    return options
