"""The sweep file's top level. What lies below is defined by the core dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from llem_ray.config.document import Document, shorten
from llem_ray.config.fields import Leaf, Section, closest, section_of, unknown_key
from llem_ray.config.patches import EXPERIMENT, nested, read_patch
from llem_ray.core.measure_spec import FootprintSpec, MeasureSpec, StoppingSpec
from llem_ray.core.spec import Order, Rates

SCHEMA_VERSION: Final = 1

NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepFile:
    """A sweep file as written: what is measured, how, and how often."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "use_attribute_docstrings": True}

    schema_version: Literal[1]
    """Version of this format."""
    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Name of the run directory, with a hash behind it; default: the file's name."""
    base: dict[str, Any] = field(default_factory=dict)
    """The experiment that all cells start from: `model`, `engine`, `workload`, `sampling`."""
    sweep: dict[str, Any] = field(default_factory=dict)
    """Axes: dotted field -> values. The grid is the product of all axes. Values are a list, `{pow2: [1, 64]}` or
    `{range: [first, last, step]}`, ends included. Under a name of your own: a list of partial experiments, a dependent group."""
    zip: list[dict[str, Any]] = field(default_factory=list)
    """Blocks of axes that advance together: in each block all lists are equally long."""
    experiments: list[dict[str, Any]] = field(default_factory=list)
    """Partial experiments that run besides the grid, each on top of `base`. Without `sweep` and `zip` there is no grid."""
    exclude: list[dict[str, Any]] = field(default_factory=list)
    """Rules that drop cells of the grid: dotted field -> value, or list of values. All fields of a rule must match."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Trials of each cell; with `stopping.half_width_rel`, at most."""
    stopping: StoppingSpec = field(default_factory=StoppingSpec)
    """When a cell has enough repeats."""
    order: Order = "interleaved"
    """Run order on one loaded model. `interleaved` runs every cell once per round and every other round backwards, so that
    drift falls on all alike; `shuffled` draws each round's order from `seed`; `sequential` runs a cell's repeats in a row."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the shuffled order."""
    measure: MeasureSpec = field(default_factory=MeasureSpec)
    """How it is measured."""
    rates: Rates = field(default_factory=Rates)
    """What trials are known to cost, for the estimate of `llem-ray plan`."""
    footprint: FootprintSpec = field(default_factory=FootprintSpec)
    """What a kWh emits and costs, for the columns `carbon_g` and `energy_cost`."""
    max_cells: Annotated[int, Field(ge=1)] = 10_000
    """A sweep of more cells is refused, so that a slip in an axis is noticed."""


TREE: Final[Section] = section_of(SweepFile)
"""All fields of the file; ``base`` is open here and described by ``patches.EXPERIMENT``."""

OWN_RULES: Final = ("base", "sweep", "zip", "experiments", "exclude")
"""Keys whose content is partial experiments or axes."""


def read_top_level(document: Document) -> SweepFile:
    """Check the file's keys and the types of all but ``base``, axes and rules, which are read by their own.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type.
    """
    for key in document.value:
        if key not in TREE.children:
            hint = f"move it under base: base.{key}" if key in EXPERIMENT.children else None
            error = unknown_key(document, (key,), key, TREE)
            error.hint = hint or error.hint or closest(key, EXPERIMENT.children)
            raise error
    if "schema_version" not in document.value:
        raise document.error((), "schema_version is missing", hint=f"add the line: schema_version: {SCHEMA_VERSION}")
    values: dict[str, Any] = {}
    for key, value in document.value.items():
        child = TREE.children[key]
        if isinstance(child, Section):
            flat = read_patch(document, (key,), value, (key,), tree=TREE, dotted_keys=False)
            below = nested({path: assigned.value for path, assigned in flat.items()}).get(key, {})
            values[key] = build(child, below)
        elif key in OWN_RULES:
            values[key] = _container(document, key, value, child)
        else:
            values[key] = child.check(document, (key,), value)
    return SweepFile(**values)


def build(section: Section, values: Mapping[str, Any]) -> Any:
    """The section's dataclass from checked values."""
    made = {
        name: build(child, values[name]) if isinstance(child, Section) else values[name]
        for name, child in section.children.items()
        if name in values
    }
    return section.cls(**made)


def _container(document: Document, key: str, value: Any, leaf: Leaf) -> Any:
    expected = dict if leaf.open else list
    if value is None:
        return expected()
    if not isinstance(value, expected):
        allowed = "a mapping of dotted field to values" if expected is dict else "a list of mappings"
        raise document.error((key,), f"{key} has the wrong type", found=shorten(value), allowed=allowed)
    for i, item in enumerate(value if expected is list else ()):
        if not isinstance(item, dict):
            raise document.error((key, i), f"an item of {key} is a mapping", found=shorten(item), allowed="a mapping")
    return value
