"""The schema of a run and of a study: what YAML files and ``--set`` may say: types, ranges, cross-checks.

Models are frozen and refuse unknown keys. A run's identity is the SHA-256 of its canonical JSON: two runs
with the same `run_hash` do the same thing; `plan_hash` leaves the seed out, so the seeds of one arm share it.
Values come from ``configs/`` through `benchmark.compose`, which makes one line of a failed check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from benchmark.config_model import BackendConfig, LoRAConfig, TemplateConfig
from benchmark.schema import Count as Count
from benchmark.schema import Fraction as Fraction
from benchmark.schema import Model as Model
from benchmark.schema import Name as Name
from benchmark.schema import Positive as Positive
from benchmark.schema import canonical as canonical
from benchmark.schema import digest as digest
from benchmark.schema import fault as fault

Currency = Literal["rollouts", "prompt_tokens", "tokens_generated", "tokens_scored", "tokens_backpropagated", "flops"]
BudgetCurrency = Literal["tokens_generated", "rollouts"]
BUDGET_CURRENCIES: tuple[str, ...] = get_args(BudgetCurrency)
Metric = Annotated[str, Field(pattern=r"^pass_at_[1-9][0-9]*$")]
# YAML and JSON have lists only; the elements stay strictly typed.
Range = Annotated[tuple[int, int], Field(strict=False)]
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]


class ArchitectureConfig(Model):
    """A Qwen2-architecture policy made from scratch; about 0.42M parameters by default."""

    hidden_size: Count = 128
    layers: Count = 3
    heads: Count = 4
    kv_heads: Count = 1
    mlp: Count = 256

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise fault(
                "heads",
                f"hidden_size {self.hidden_size} is not an even multiple of heads {self.heads}",
                "Rotary embeddings need an even head size: choose heads that divide hidden_size / 2",
            )
        if self.heads % self.kv_heads:
            raise fault("kv_heads", f"does not divide heads = {self.heads}", "Choose a divisor of heads")
        return self


class StylesConfig(Model):
    """Shares of the three styles of worked solutions in the warm-up data."""

    direct: Fraction = 0.25
    partial: Fraction = 0.30
    full: Fraction = 0.45

    @model_validator(mode="after")
    def _shares(self) -> Self:
        total = self.direct + self.partial + self.full
        if abs(total - 1) > 1e-9:
            raise fault("full", f"the shares of the styles add up to {total:.6g}", "Let them add up to 1")
        return self


class WarmupConfig(Model):
    """Supervised warm-up on imperfect worked solutions; `batch` sequences a step."""

    steps: Count = 1500
    batch: Count = 128
    error_rate: Fraction = 0.14
    styles: StylesConfig = StylesConfig()
    learning_rate: Positive = 0.02
    seed: Annotated[int, Field(ge=0)] = 0


class PolicyConfig(Model):
    """The policy before RL: warmed up here from `architecture`, or read from `path`.

    `path` is a transformers folder, a GGUF file, a hub id (a local copy under ``ROLLOUTBENCH_MODELS`` goes first), or
    ``package:NAME/FILE`` for a file that an installed Python package brings.
    """

    architecture: ArchitectureConfig = ArchitectureConfig()
    warmup: WarmupConfig = WarmupConfig()
    path: str | None = None
    template: TemplateConfig = TemplateConfig()
    lora: LoRAConfig | None = None


class MixComponent(Model):
    """One kind of problem in a procedural task.

    Attributes:
        family: the generator, for instance ``chain_sum``.
        name: what the results call it; the family by default.
        num_terms, num_digits: inclusive ranges [low, high].
        min_value, max_value: inclusive bounds of the numbers, where the family takes them.
        weight: share of the training items, relative to the other components.
    """

    family: Name
    name: Name
    num_terms: Range | None = None
    num_digits: Range | None = None
    min_value: int | None = None
    max_value: int | None = None
    weight: Positive = 1.0

    @model_validator(mode="before")
    @classmethod
    def _name(cls, data: Any) -> Any:
        return {"name": data["family"], **data} if isinstance(data, dict) and "family" in data else data

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for key, bounds in (("num_terms", self.num_terms), ("num_digits", self.num_digits)):
            if bounds is not None and not 1 <= bounds[0] <= bounds[1]:
                raise fault(key, f"{list(bounds)} is not a range", "Write [low, high] with 1 <= low <= high")
        if self.min_value is not None and self.max_value is not None and self.min_value > self.max_value:
            raise fault("min_value", f"is above max_value = {self.max_value}", "Let min_value <= max_value")
        return self


class HubConfig(Model):
    """A data set of the Hugging Face hub in the place of a file that is not here, and the columns that are read."""

    id: str
    config: str | None = None
    split: str = "train"
    problem: str = "problem"
    answer: str = "answer"


class TaskConfig(Model):
    """The problems: generated from `mix`, or read from JSONL (`train_file`, `eval_files` by family).

    `train_items` is the size of the training pool (items, mixed by weight); every family is evaluated on
    `eval_items_per_family` items that no training item repeats. Sizes do not apply to files.

    Files are looked for here, then in the folder ``ROLLOUTBENCH_DATA``, then on the `hub`, by the file's name. With
    `overlap` training problems are cleaned (`benchmark.contamination`): those go that share at least this part of an
    evaluation problem's 8-grams.
    """

    name: Name
    mix: Annotated[tuple[MixComponent, ...], Field(strict=False)] = ()
    train_items: Count = 1024
    eval_items_per_family: Count = 64
    seed: Annotated[int, Field(ge=0)] = 0
    answer_form: Literal["any", "integer"] = "integer"
    train_file: str | None = None
    eval_files: dict[Name, str] = Field(default_factory=dict)
    hub: dict[str, HubConfig] = Field(default_factory=dict)
    overlap: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def families(self) -> tuple[str, ...]:
        """Names under which evaluation results are grouped, in file order."""
        return tuple(part.name for part in self.mix) or tuple(self.eval_files)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.mix) == (self.train_file is not None):
            raise fault("mix", "a task is either generated or read from files", "Give mix or train_file")
        if (self.train_file is None) != (not self.eval_files):
            raise fault("eval_files", "a task from files needs both", "Give train_file and eval_files")
        twice = {name for name in self.families if self.families.count(name) > 1}
        if twice:
            raise fault("mix", f"two components are called {min(twice)}", "Give each component its own name")
        return self


class RolloutConfig(Model):
    """Sampling of training rollouts: full softmax at `temperature`, at most `max_tokens` tokens.

    Attributes:
        staleness: rollouts come from the policy of so many steps ago (`benchmark.staleness`).
    """

    prompts_per_batch: Count = 64
    rollouts_per_prompt: Count = 8
    max_tokens: Count = 48
    temperature: Positive = 1.0
    # Where it is off it is no part of a run's identity; so too the verifier's section.
    staleness: Annotated[int, Field(ge=0, exclude_if=lambda steps: steps == 0)] = 0


class VerifierConfig(Model):
    """How far training can trust the verifier.

    Attributes:
        flip_rate: chance that a training verdict is the opposite, correct or wrong, drawn by prompt and rollout so that
            all arms meet the same errors. Evaluation and oracles are told the truth.
    """

    flip_rate: Fraction = 0.0


class OptimiserConfig(Model):
    """AdamW; a batch makes `minibatches_per_batch` x `epochs` updates, so that ratios leave 1."""

    learning_rate: Positive = 3e-4
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    gradient_clip: Positive = 1.0
    minibatches_per_batch: Count = 4
    epochs: Count = 1
    warmup_steps: Annotated[int, Field(ge=0)] = 0


class BudgetConfig(Model):
    """What a run may spend on training; it ends exactly there."""

    currency: BudgetCurrency = "tokens_generated"
    amount: Count


class EvaluationConfig(Model):
    """Learning curve: `points` (the first before training), `samples` an item, more at the last point."""

    points: Annotated[int, Field(ge=2)] = 8
    samples: Count = 4
    final_samples: Count = 64
    k: Counts = (1, 8, 32)
    temperature: Positive = 1.0

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if list(self.k) != sorted(set(self.k)):
            raise fault("k", f"{list(self.k)} is not ascending", "List every k once, smallest first")
        if self.final_samples < 2 * self.k[-1]:
            raise fault(
                "final_samples",
                f"pass@{self.k[-1]} needs at least {2 * self.k[-1]} samples an item, or it is a coin flip",
                f"Raise final_samples to {2 * self.k[-1]} or drop k = {self.k[-1]}",
                "k",
            )
        return self


class MethodConfig(Model):
    """A method and the parameters that differ from its defaults, nested like its dataclasses."""

    name: Name
    params: dict[str, Any] = Field(default_factory=dict)


def identity(config: Mapping[str, Any]) -> str:
    """SHA-256 of a run's configuration without the name of its study."""
    return digest({key: value for key, value in config.items() if key != "study"})


class RunConfig(Model):
    """Everything that decides the result of one run (one arm, one seed)."""

    study: Name
    arm: Name
    seed: Annotated[int, Field(ge=0)]
    scale: Name
    policy: PolicyConfig = PolicyConfig()
    task: TaskConfig
    rollout: RolloutConfig = RolloutConfig()
    verifier: Annotated[VerifierConfig, Field(exclude_if=lambda section: section == VerifierConfig())] = (
        VerifierConfig()
    )
    optimiser: OptimiserConfig = OptimiserConfig()
    backend: BackendConfig = BackendConfig()
    budget: BudgetConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    method: MethodConfig

    @property
    def run_hash(self) -> str:
        """Identity of the run: the study's name left out, since it decides nothing."""
        return identity(self.model_dump(mode="json"))

    @property
    def plan_hash(self) -> str:
        """Identity of the arm: the seed left out too."""
        return identity(self.model_dump(mode="json", exclude={"seed"}))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rollout, prompts = self.rollout, self.rollout.prompts_per_batch
        if self.backend.name == "native" and self.policy.lora is not None:
            raise fault("policy.lora", "the native backend trains all weights", "Set backend.name: transformers")
        if self.backend.name != "native" and rollout.staleness:
            what = f"the {self.backend.name} backend samples from the newest policy"
            raise fault("rollout.staleness", what, "Set it to 0, or backend.name: native", "backend.name")
        if self.optimiser.minibatches_per_batch > prompts:
            raise fault(
                "optimiser.minibatches_per_batch",
                f"{self.optimiser.minibatches_per_batch} minibatches cannot share {prompts} prompts",
                "Lower it, or raise rollout.prompts_per_batch",
                "rollout.prompts_per_batch",
            )
        if self.task.mix and prompts > self.task.train_items:
            raise fault(
                "rollout.prompts_per_batch",
                f"{self.task.train_items} training items cannot fill a batch of {prompts} prompts",
                "Lower it, or raise task.train_items",
                "task.train_items",
            )
        price = 1 if self.budget.currency == "rollouts" else rollout.max_tokens
        group = rollout.rollouts_per_prompt * price
        if self.budget.amount < group:
            raise fault(
                "budget.amount",
                f"{self.budget.amount} {self.budget.currency} may not pay for one group of rollouts",
                f"Raise it to at least {group}",
                "rollout.rollouts_per_prompt",
                "rollout.max_tokens",
            )
        return self


class Claim(Model):
    """A statement fixed before any run: `arm` beats `reference` in `metric` by more than `min_effect`."""

    id: Name
    text: str
    arm: Name
    reference: Name
    metric: Metric = "pass_at_1"
    min_effect: Annotated[float, Field(ge=0, lt=1)] = 0.0


class ArmConfig(Model):
    """One row of the table: a method, changed parameters, and the label it goes by (its name by default)."""

    name: Name
    params: dict[str, Any] = Field(default_factory=dict)
    label: Name

    @model_validator(mode="before")
    @classmethod
    def _label(cls, data: Any) -> Any:
        data = {"name": data} if isinstance(data, str) else data
        return {"label": data.get("name"), **data} if isinstance(data, dict) else data


def _seeds(value: Any) -> Any:
    return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value


class StudyConfig(Model):
    """A study: the question, what would answer it, and the arms x seeds to run.

    Attributes:
        claims: answered one by one in REPORT.md, by `decision_rule`.
        primary_currency: the x-axis and the budget's currency.
        scale: file of ``configs/scales`` used unless another is asked for.
        task: file of ``configs/tasks``; the scale's own by default.
        seeds: a list, or a number n for 0 .. n-1; seed s of every arm shares its random streams.
        reference: the arm that all others are compared with.
        overrides: values that this study changes in every arm, whatever the scale says.
        gradient_variance_replicates: replicates of the gradient-variance measurement on the policy before RL that
            the report shows; 0 measures nothing.
    """

    study: Name
    question: str
    claims: Annotated[tuple[Claim, ...], Field(strict=False)] = ()
    primary_metric: Metric = "pass_at_1"
    primary_currency: BudgetCurrency = "tokens_generated"
    scale: str = "small"
    task: str | None = None
    arms: Annotated[tuple[ArmConfig, ...], Field(strict=False, min_length=1)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_seeds), Field(strict=False)]
    reference: Name = "grpo"
    decision_rule: str = ""
    overrides: dict[str, Any] = Field(default_factory=dict)
    gradient_variance_replicates: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _known(self) -> Self:
        labels = [arm.label for arm in self.arms]
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise fault("arms", f"two arms are called {twice}", "Give each its own label")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise fault("seeds", "missing or repeated", "Give a number, or a list of distinct seeds")
        if self.reference not in labels:
            raise fault("reference", f"{self.reference} is not an arm of this study", "Add it to arms")
        for position, claim in enumerate(self.claims):
            for key in ("arm", "reference"):
                if getattr(claim, key) not in labels:
                    what = f"{getattr(claim, key)} is not an arm of this study"
                    raise fault(f"claims.{position}.{key}", what, "Add it to arms, or mend the claim")
        return self
