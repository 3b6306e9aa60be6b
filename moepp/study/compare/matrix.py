"""A matrix of variants → the runs of a study, each with every option resolved and checked before any begins."""

import contextlib
import io
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moepp.model import InputError, MoEConfig, TransformerConfig, flops_per_token
from moepp.system.files import read_yaml
from moepp.text.tokenizer import padded_vocab_size
from moepp.training import lightning_cli

PLOTS = ("curves", "tau", "constants")
KINDS = {
    "base": str,
    "reference": str,
    "seeds": int,
    "quick": dict,
    "sources": dict,
    "variants": dict,
}  # of a matrix
STUDY_KEYS = {"paper", "plots", "ffn_width"}  # of a variant; all its other keys are options of the run
ANY_SEED = 2**31 - 1  # where this value turns up in resolved options, the recipe wants the seed there


@dataclass(frozen=True)
class Variant:
    """One row of a study: a resolved configuration and what the paper says of it."""

    name: str
    options: dict[str, Any]  # of `moepp fit`, as in a recipe; `ANY_SEED` stands for the seed
    paper: dict[str, dict[str, float]] = field(default_factory=dict)  # quantity → model size → value
    plots: tuple[str, ...] = ()

    @property
    def transformer(self) -> TransformerConfig:
        sizes = self.options["model"]["transformer"]
        return TransformerConfig(**sizes | {"vocab_size": padded_vocab_size(self.options["data"]["vocab_size"])})

    @property
    def moe(self) -> MoEConfig:
        return MoEConfig(**self.options["model"]["moe"])

    @property
    def steps(self) -> int:
        return self.options["trainer"]["max_steps"]

    @property
    def tokens(self) -> int:
        """Training tokens of one run."""
        trainer, data = self.options["trainer"], self.options["data"]
        per_device = self.steps * trainer["accumulate_grad_batches"] * data["batch_size"] * data["seq_len"]
        return per_device * trainer["devices"]

    def training_flops(self, ffn_per_token: float | None = None) -> float:
        """FLOPs of one run's training steps, by default with the FFN experts per token that theory expects."""
        if ffn_per_token is None:
            ffn_per_token = self.moe.expected_ffn_per_token
        seq_len = self.options["data"]["seq_len"]
        return self.tokens * 3 * flops_per_token(self.transformer, self.moe, seq_len, ffn_per_token)


@dataclass(frozen=True)
class Run:
    """One variant trained from one seed, in a folder of its own."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant.name}/seed{self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """The recipe of this run: nothing in it is left to look up."""
        return replace_seed(self.variant.options, self.seed)

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").is_file()

    @property
    def failure(self) -> str | None:
        """The last line of a run that failed."""
        path = self.folder / "failed.txt"
        return path.read_text().strip() if path.is_file() and not self.finished else None


@dataclass(frozen=True)
class Matrix:
    """What is compared with what."""

    path: Path
    variants: list[Variant]
    reference: Variant
    sources: dict[str, str]  # quantity → what the paper's figure is and where it stands

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
    if unknown := {str(key) for key in matrix} - set(KINDS):
        raise InputError(f"{path}: unknown key {min(unknown)!r}: use {', '.join(sorted(KINDS))}")
    for key, value in matrix.items():
        as_kind(value, KINDS[key], f"{path}: {key}")
    if matrix.get("reference") not in matrix["variants"]:
        raise InputError(f"{path}: its reference {matrix.get('reference')!r} is none of its variants")
    for name, variant in matrix["variants"].items():
        if not isinstance(variant, dict | None) or not isinstance(name, str) or not is_file_name(name):
            raise InputError(f"{path}: variant {name!r}: is no name with a mapping of options")
        variant = variant or {}
        for plot in as_kind(variant.get("plots", []), list, f"{path}: variant {name}: plots"):
            if plot not in PLOTS:
                raise InputError(f"{path}: variant {name}: no plot {plot!r}: use {', '.join(PLOTS)}")
        if as_kind(variant.get("ffn_width", 1), int, f"{path}: variant {name}: ffn_width") < 1:
            raise InputError(f"{path}: variant {name}: ffn_width: must be at least 1")
        for quantity, figures in as_kind(variant.get("paper", {}), dict, f"{path}: variant {name}: paper").items():
            for figure in as_kind(figures, dict, f"{path}: variant {name}: paper.{quantity}").values():
                as_kind(figure, (int, float), f"{path}: variant {name}: paper.{quantity}")
    return matrix


def is_file_name(name: str) -> bool:
    return name != "" and "\0" not in name and Path(name).name == name


def as_kind(value: Any, kind: Any, name: str) -> Any:
    """The value, or an InputError that it is of another type."""
    if not isinstance(value, kind):
        raise InputError(f"{name}: {value!r} is of the wrong type, see recipes/compare.yaml")
    return value


def resolve(path: Path, matrix: dict[str, Any], base: Path, overrides: list[str]) -> Matrix:
    """Each variant over `overrides` over `base`, every option checked as `moepp fit` checks it.

    Raises:
        InputError: an option is wrong, or two variants are the same configuration.
    """
    variants: list[Variant] = []
    for name, entry in matrix["variants"].items():
        changes = {key: value for key, value in (entry or {}).items() if key not in STUDY_KEYS}
        study = {key: value for key, value in (entry or {}).items() if key in STUDY_KEYS}
        try:
            options = fit_options(base, overrides, changes)
            transformer, trainer = options["model"]["transformer"], options["trainer"]
            transformer["intermediate_size"] *= study.get("ffn_width", 1)
            if trainer["devices"] == "auto":
                trainer["devices"] = 1  # the same run on any machine; more GPUs take more runs at once
            if not str(trainer["devices"]).isdigit():
                raise InputError(f"trainer.devices: a study needs a number of devices, got {trainer['devices']}")
            trainer["devices"] = int(trainer["devices"])  # the command line's is a string
            variant = Variant(name, options, study.get("paper") or {}, tuple(study.get("plots", ())))
            if variant.steps < 1:
                raise InputError(f"trainer.max_steps: a study needs a number of steps, got {variant.steps}")
            _ = variant.transformer, variant.moe  # their constructors refuse impossible values
        except InputError as error:
            raise InputError(f"{path}: variant {name}: {error}") from error
        for other in variants:
            if other.options == options:
                raise InputError(f"{path}: variants {other.name} and {name} are the same configuration")
        variants.append(variant)
    reference = next(variant for variant in variants if variant.name == matrix["reference"])
    return Matrix(path, variants, reference, matrix.get("sources") or {})


def fit_options(base: Path, overrides: list[str], changes: dict[str, Any]) -> dict[str, Any]:
    """What `moepp fit` would run with; later arguments win."""
    if not base.is_file():
        raise InputError(f"base: {base} does not exist")
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder) / "variant.yaml"
        overlay.write_text(yaml.safe_dump(changes))
        arguments = ["--config", str(base), *overrides, "--config", str(overlay), f"--seed_everything={ANY_SEED}"]
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            lightning_cli.run("fit", [*arguments, "--print_config"])
    options = yaml.safe_load(printed.getvalue())
    lightning_cli.require_sections(options)
    del options["base"]  # resolved
    own = {"ckpt_path": options.pop("ckpt_path")}
    own["trainer.default_root_dir"] = options["trainer"].pop("default_root_dir")
    for key, value in own.items():
        if value is not None:
            raise InputError(f"{key}: a study gives each run its own, so {value} cannot be set")
    return options


def replace_seed(options: Any, seed: int) -> Any:
    if isinstance(options, dict):
        return {key: replace_seed(value, seed) for key, value in options.items()}
    return seed if options == ANY_SEED else options
