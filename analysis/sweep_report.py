"""The report of a sweep: what tuning is worth on fresh seeds, what it cost, and what it found."""

from __future__ import annotations

from pathlib import Path

from analysis.figures import Drawn
from analysis.formatting import counted, currency_name, exact
from analysis.provenance import made_by
from analysis.results import read_json
from analysis.sweep_data import TRIALS, SweepRecord, load_sweep, trial_rows
from analysis.sweep_figures import write_sweep_figures
from analysis.sweep_tables import finalists_table, settings_table, tuned_table, tuning_table
from analysis.tables import Table, no_html, no_links
from benchmark.jsonl import atomic_write_text
from benchmark.seal import write_manifest
from benchmark.sweep_trial import DONE


def write_sweep_report(folder: Path, out: Path | None = None) -> Path:
    """Write ``REPORT.md``, ``tables/`` and ``figures/`` of a sweep from its files, and ``manifest.json`` last.

    Args:
        out: another folder for the report, which gets no manifest; `folder` then stays as it is.

    Raises:
        InputError: the folder holds no sweep, or a record is damaged.
    """
    record = load_sweep(folder)
    tables = {table.name: table for table in _tables(record)}
    place = out or folder
    (place / "tables").mkdir(exist_ok=True)
    for table in tables.values():
        table.write(place / "tables")
    atomic_write_text(place / "tables" / TRIALS, trial_rows(record).to_csv(index=False))
    figures = {drawn.name: drawn for drawn in write_sweep_figures(record, place / "figures")}
    path = place / "REPORT.md"
    atomic_write_text(path, _compose(record, tables, figures))
    if out is None:
        write_manifest(folder, made_by())
    return path


def _tables(record: SweepRecord) -> list[Table]:
    scores = record.scores
    final = [] if scores is None else [tuned_table(record, scores), finalists_table(record, scores)]
    return [*final, tuning_table(record), settings_table(record)]


def _compose(record: SweepRecord, tables: dict[str, Table], figures: dict[str, Drawn]) -> str:
    def table(name: str) -> str:
        return _table(tables[name]) if name in tables else ""

    def of(kind: str) -> str:
        return "".join(_figure(drawn) for name, drawn in figures.items() if name.startswith(kind))

    sections = {
        "What to know first": _problems(record),
        "Default and tuned": table("tuned") + table("finalists") + _final_link(record),
        "The search": table("tuning") + of("history") + of("pareto"),
        "Settings": table("settings") + _best(record),
        "What mattered": of("importance") + of("slice") + of("contour") + of("parallel"),
        "How to reproduce": _reproduce(record),
    }
    body = "".join(f"## {title}\n\n{text.strip()}\n\n" for title, text in sections.items() if text.strip())
    return no_html(f"# {record.config.sweep}\n\n{_opening(record)}\n\n{body.rstrip()}\n")


def _opening(record: SweepRecord) -> str:
    config = record.config
    run = record.sweep.run(record.labels[0], record.labels[0], None, config.seeds[0])
    facts = (
        f"{counted(len(config.arms), 'arm')}, {counted(config.trials, 'trial')} each ({config.sampler}, pruner "
        f"{config.pruner}), every trial with the same {counted(len(config.seeds), 'training seed')} and "
        f"{exact(run.budget.amount)} {currency_name(run.budget.currency)} a run, scale `{config.scale}`; the default "
        f"and the best {counted(config.finalists.count, 'setting')} of every arm then ran on "
        f"{counted(len(config.finalists.seeds), 'fresh seed')}, and only those figures are reported as results."
    )
    return f"**{no_links(config.question)}**\n\n{facts}" if config.question else facts


def _problems(record: SweepRecord) -> str:
    lines = []
    for row in record.trials[record.trials["state"].isin(["failed", "missing"])].to_dict("records"):
        name = f"{row['arm']}-t{row['number']:03d}"
        why = f" ({row['message']}; log: `trials/{name}/run.log`)" if row["message"] else ""
        lines.append(f"Trial {name} {'failed' if row['state'] == 'failed' else 'has not run'}{why}.")
    if (record.trials["state"] == "failed").any():
        again = (read_json(record.folder / "plan.json") or {}).get("command") or "the command of this sweep"
        lines.append(f"What failed is run again by: `{again}`")
    whole = {label: len(record.of(label)) - len(record.of(label, "failed", "missing")) for label in record.labels}
    if len(set(whole.values())) > 1:
        lines.append("The arms were not tuned alike: a trial is missing. The same command runs it.")
    lines += [f"No trial of {label} ended whole." for label in record.labels if record.of(label, DONE).empty]
    if record.scores is None:
        lines.append("No finalist has run: nothing here is a result yet.")
    else:
        lines += record.scores.study.problems
    return "".join(f"- {line}\n" for line in lines)


def _final_link(record: SweepRecord) -> str:
    if record.scores is None or not (record.folder / "final" / "REPORT.md").exists():
        return ""
    return "The full report of the fresh seeds: [final/REPORT.md](final/REPORT.md).\n"


def _best(record: SweepRecord) -> str:
    links = ", ".join(
        f"[{label}](best/{label}.yaml)"
        for label in record.labels
        if (record.folder / "best" / f"{label}.yaml").exists()
    )
    return f"As files for `rolloutbench run --config FILE`: {links}.\n" if links else ""


def _reproduce(record: SweepRecord) -> str:
    command = "rolloutbench sweep DIR/sweep.yaml --out DIR"
    return (
        f"```\n{command}\n```\n\nDIR is this folder; only what is missing runs. `rolloutbench report DIR` makes the "
        "report again; `optuna-dashboard DIR/journal.log` shows the trials."
    )


def _table(table: Table) -> str:
    links = ", ".join(f"[{suffix}](tables/{table.name}.{suffix})" for suffix in ("csv", "tex"))
    notes = "".join(f"{note}\n" for note in table.notes)
    return f"**{table.title}** ({links})\n\n{table.markdown()}\n{notes}\n"


def _figure(drawn: Drawn) -> str:
    links = ", ".join(f"[{suffix}](figures/{drawn.name}.{suffix})" for suffix in ("svg", "pdf"))
    return f"![{drawn.caption}](figures/{drawn.name}.png)\n\n*{drawn.caption}* ({links})\n\n"
