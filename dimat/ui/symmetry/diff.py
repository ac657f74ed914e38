"""`dimat symmetry diff`: whether two models can be aligned and merged."""

from __future__ import annotations

from dimat.json_text import to_json
from dimat.symmetry import SymmetrySpec
from dimat.ui.symmetry.tables import ModelSymmetry, open_described, summary_of, totals


def diff_symmetry(one: str, other: str, *, as_json: bool) -> tuple[str, bool]:
    """Compare two models, experiments or spec files; return the text to print, and whether their hashes are equal."""
    first, second = open_described(one), open_described(other)
    same = first.spec.arch_hash == second.spec.arch_hash
    why = None if same else first_difference(first, second)
    if as_json:
        sides = [
            {
                "name": each.name,
                "arch_hash": each.spec.arch_hash,
                "groups_hash": each.spec.groups_hash,
                "trace_kind": each.spec.trace_kind,
            }
            | {key: value for key, value in summary_of(each).items() if key not in ("tensors", "frozen", "natures")}
            for each in (first, second)
        ]
        return to_json({"same": same, "models": sides, "first_difference": why}), same
    if same:
        return f"same architecture: {totals(first)}", True
    lines = [f"{each.name}: {totals(each)}" for each in (first, second)]
    lines.append(f"first difference: {why}")
    if first.tensors == second.tensors and first.tensors:
        fit = first.spec.groups_hash == second.spec.groups_hash
        lines.append(
            "agents with them can still align: tensors and groups are equal"
            if fit
            else "agents with them refuse each other: the groups differ"
        )
    return "\n".join(lines), False


def first_difference(one: ModelSymmetry, other: ModelSymmetry) -> str:
    """Return the first difference in one line: a tensor by name, else an axis or a group, else the graph."""
    if one.tensors and other.tensors:
        for name in sorted({*one.tensors, *other.tensors}):
            for side, lacking in ((one, other), (other, one)):
                if name not in lacking.tensors:
                    return f"tensor {name} {_form(side, name)} is only in {side.name}"
            if one.tensors[name] != other.tensors[name]:
                return f"tensor {name} is {_form(one, name)} in {one.name}, {_form(other, name)} in {other.name}"
    return _in_specs(one.spec, other.spec, one.name, other.name)


def _in_specs(one: SymmetrySpec, other: SymmetrySpec, first: str, second: str) -> str:
    if one.trace_kind != other.trace_kind:
        return f"{first} was traced by {one.trace_kind}, {second} by {other.trace_kind}"
    sides = [{(axis.tensor, axis.dim): axis for axis in spec.axes} for spec in (one, other)]
    for key in sorted({*sides[0], *sides[1]}):
        mine, theirs = sides[0].get(key), sides[1].get(key)
        if mine is None or theirs is None:
            return f"axis {key[0]}/{key[1]} moves only in {second if mine is None else first}"
        if mine.size != theirs.size:
            return f"axis {key[0]}/{key[1]} has {mine.size} entries in {first}, {theirs.size} in {second}"
        if mine.layout != theirs.layout:
            return f"axis {key[0]}/{key[1]} is made of other groups in {first} than in {second}"
    groups = [
        {group.id: (group.size, group.parents) for group in (*spec.groups, *spec.numbered)} for spec in (one, other)
    ]
    for name in sorted({*groups[0], *groups[1]}):
        if groups[0].get(name) != groups[1].get(name):
            return f"group {name} differs in size or parents"
    if one.outputs != other.outputs:
        return f"other outputs are kept: {list(one.outputs)} in {first}, {list(other.outputs)} in {second}"
    return "the graphs of operations (tensors and groups are the same)"


def _form(described: ModelSymmetry, name: str) -> str:
    shape, dtype = described.tensors[name]
    return f"{dtype} {tuple(shape)}"
