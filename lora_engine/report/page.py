"""report.html: one run, or several side by side, as one self-contained HTML file.

Style, charts and thumbnails are embedded. It has no scripts and loads nothing from a network, and
its content security policy enforces that.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_engine.files import replaced_file
from lora_engine.report import run_facts
from lora_engine.report.charts import charts, color_chip, run_color
from lora_engine.report.gallery import gallery
from lora_engine.report.html import Markup, join, tag
from lora_engine.report.run_facts import NOTHING, Result
from lora_engine.report.run_record import RunRecord, read_run

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MAX_REASONS = 10
MAX_SKIPPED = 100


def write_report(runs: Sequence[str | Path], out_path: str | Path) -> None:
    """Write one HTML file about a run folder, or about several side by side.

    An existing file is replaced only once the new one is complete. Images that can no longer be
    read are shown as gray boxes.

    Raises ValueError for a folder that holds no run, for a damaged file in one (with its line),
    and for a run that is given twice.
    """
    seen: set[Path] = set()
    for path in map(Path, runs):
        if path.resolve() in seen:
            raise ValueError(f"{path} is given twice; name each run once")
        seen.add(path.resolve())
    records = [read_run(path) for path in runs]
    page = _page_of_one(records[0]) if len(records) == 1 else _page_of_several(records)
    with replaced_file(out_path) as new:
        # File names may hold bytes that are not text.
        new.write_text(page.source, encoding="utf-8", errors="backslashreplace")


# --- pages ----------------------------------------------------------------------------------


def _page_of_one(run: RunRecord) -> Markup:
    names = run_facts.names([run])
    return _page(
        names[0],
        tag("p", run_facts.subtitle(run), class_="subtitle"),
        tag("p", run_facts.headline(run), class_="headline"),
        *(tag("p", notice, class_="notice") for notice in run_facts.notices(run)),
        _tiles(run),
        _section("Curves", *charts([run], names)),
        _section("Scores", *_scores(run)),
        _section("Captions", *gallery([join(names)], [run.images])),
        _section("What was trained", *_settings(run)),
        _section("Skipped images and rows", *_skipped(run)),
        _section("Environment", *_pairs(run_facts.versions_and_machine(run))),
        footer=f"Generated from the files in {run.path}.",
    )


def _page_of_several(runs: Sequence[RunRecord]) -> Markup:
    names = run_facts.names(runs)
    labels = [join([color_chip(run_color(index)), name]) for index, name in enumerate(names)]
    notices = [
        f"{name}: {notice}" for run, name in zip(runs, names) for notice in run_facts.notices(run)
    ]
    pictures = gallery(labels, [run.images for run in runs])
    return _page(
        f"{len(runs)} runs compared",
        tag("ul", *(tag("li", label) for label in labels), class_="legend"),
        *(tag("p", notice, class_="notice") for notice in notices),
        _section("Results", *_results(runs, labels, names)),
        _section(
            "Settings", *_differences([run_facts.settings(run) for run in runs], labels, names)
        ),
        _section("Curves", *charts(runs, names)),
        _section(
            "Captions of the same images",
            *(pictures or [tag("p", "The runs have no captioned images in common.")]),
        ),
        _section(
            "Environment",
            *_differences([run_facts.versions_and_machine(run) for run in runs], labels, names),
        ),
        footer="Generated from the files in " + ", ".join(str(run.path) for run in runs) + ".",
    )


def _page(title: str, *content: Markup, footer: str) -> Markup:
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} – training report"),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        tag("header", tag("p", "Training report", class_="kicker"), tag("h1", title)),
        tag("main", *content),
        tag("footer", tag("p", footer)),
    )
    return join([Markup("<!doctype html>\n"), tag("html", head, body, lang="en")])


def _section(title: str, *content: Markup) -> Markup:
    return tag("section", tag("h2", title), *content) if content else join([])


# --- figures and settings -------------------------------------------------------------------


def _tiles(run: RunRecord) -> Markup:
    """The main figures as tiles; of the scores only the first two."""
    left_out = {run_facts.score_name(key) for key in run_facts.score_keys([run])[2:]}
    return tag("dl", *(
        tag(
            "div",
            tag("dt", label),
            tag("dd", result.text, class_="figure"),
            tag("dd", result.remark, class_="remark"),
        )
        for label, result in run_facts.results(run).items() if label not in left_out
    ), class_="tiles")


def _scores(run: RunRecord) -> list[Markup]:
    """Loss and scores before training, with the best adapter, and at the end."""
    keys = run_facts.score_keys([run])
    losses = run.validation("loss")
    if not keys or not losses.steps:
        return []
    best_step = run.best_step
    columns = {"Before": losses.steps[0], f"Best, step {best_step:,}": best_step}
    if losses.steps[-1] != best_step:
        columns[f"Last, step {losses.steps[-1]:,}"] = losses.steps[-1]
    rows = {
        "Validation loss" if key == "loss" else run_facts.score_name(key): [
            run_facts.figure(run_facts.score_at(run, key, step)) for step in columns.values()
        ]
        for key in ["loss", *keys]
    }
    return [_table(list(columns), list(columns), rows), tag("p", run_facts.scored(run))]


def _settings(run: RunRecord) -> list[Markup]:
    defaults = run_facts.default_settings()
    rows = {
        key: [value, "" if defaults.get(key, value) == value else defaults[key]]
        for key, value in run_facts.settings(run).items()
    }
    headings = ["This run", "Default, if different"]
    everything = _table(headings, headings, rows)
    return [
        *_pairs(run_facts.main_settings(run)),
        *([tag("details", tag("summary", "All settings"), everything)] if rows else []),
    ]


def _results(
    runs: Sequence[RunRecord], labels: Sequence[Markup], names: Sequence[str]
) -> list[Markup]:
    """A row for each figure; the best of the runs is bold if they can be ranked by it."""
    found = [run_facts.results(run) for run in runs]
    rows = {}
    for label in dict.fromkeys(label for results in found for label in results):
        row = [results.get(label, Result(NOTHING)) for results in found]
        values = [result.value for result in row if result.value is not None]
        better = row[0].better
        best = better(values) if better and len(set(values)) > 1 else None
        rows[label] = [
            join([
                tag("strong" if result.value == best is not None else "span", result.text),
                tag("small", result.remark),
            ])
            for result in row
        ]
    return [_table(labels, names, rows), tag("p", "Bold: the best of the runs.", class_="hint")]


def _differences(
    tables: Sequence[Mapping[str, str]], labels: Sequence[Markup], names: Sequence[str]
) -> list[Markup]:
    """What differs between runs, and collapsed what does not."""
    keys = dict.fromkeys(key for table in tables for key in table)
    values = {key: [table[key] for table in tables if key in table] for key in keys}
    differing = {
        key: [table.get(key, NOTHING) for table in tables]
        for key in keys if len(set(values[key])) > 1
    }
    same = {key: values[key][0] for key in keys if key not in differing}
    shown = [_table(labels, names, differing)] if differing else [tag("p", "No differences.")]
    if same:
        shown.append(tag("details", tag("summary", "Same in all runs"), *_pairs(same)))
    return shown


def _pairs(values: Mapping[str, str]) -> list[Markup]:
    if not values:
        return []
    rows = [tag("div", tag("dt", key), tag("dd", value)) for key, value in values.items()]
    return [tag("dl", *rows, class_="pairs")]


def _table(
    headings: Sequence[Markup | str],
    names: Sequence[str],
    rows: Mapping[str, Sequence[Markup | str]],
) -> Markup:
    """A column per heading; on a narrow page `names` precede the cells instead."""
    head = tag("tr", tag("td"), *(tag("th", heading, scope="col") for heading in headings))
    body = [
        tag("tr", tag("th", label, scope="row"), *(
            tag("td", cell, data_of=name) for name, cell in zip(names, cells)
        ))
        for label, cells in rows.items()
    ]
    return tag("table", tag("thead", head), tag("tbody", *body))


def _skipped(run: RunRecord) -> list[Markup]:
    if not run.skipped:
        return []
    reasons = Counter(run.skipped.values()).most_common()
    rows = {reason: [run_facts.count(number)] for reason, number in reasons[:MAX_REASONS]}
    if len(reasons) > MAX_REASONS:
        rest = sum(number for _, number in reasons[MAX_REASONS:])
        rows["other reasons"] = [run_facts.count(rest)]
    paths = list(run.skipped)[:MAX_SKIPPED]
    title = "All of them" if len(paths) == len(run.skipped) else f"The first {len(paths)}"
    listed = tag("ul", *(tag("li", path) for path in paths))
    return [
        _table(["Number"], ["Number"], rows),
        tag("details", tag("summary", title), listed),
    ]
