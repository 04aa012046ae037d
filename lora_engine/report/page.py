"""report.html: one run, or several side by side, as one self-contained HTML file.

Style, charts and thumbnails are embedded. It has no scripts and loads nothing from a network, and
its content security policy enforces that.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from lora_engine.files import replaced_file
from lora_engine.report import run_facts
from lora_engine.report.charts import charts, color_chip, run_color
from lora_engine.report.gallery import gallery, thumbnail
from lora_engine.report.html import Markup, join, tag
from lora_engine.report.run_facts import NOTHING, Result
from lora_engine.report.run_record import AVERAGE, RunRecord, read_run
from lora_engine.terminal import counted

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MAX_REASONS = 10
MAX_SKIPPED = 100


def write_report(
    runs: Sequence[str | Path],
    out_path: str | Path,
    *,
    running: Sequence[str | Path] = (),
    reload_s: int = 60,
    thumbnail: Callable[[str], Markup] = thumbnail,
    note: str = "",
) -> None:
    """Write one HTML file about a run folder, or about several side by side.

    An existing file is replaced only once the new one is complete. Images that can no longer be
    read are shown as gray boxes. `running` are those of the runs that are still training; the page
    of a single one reloads itself every `reload_s` seconds. `thumbnail` as for `gallery`. A `note`
    stands above the comparison of several.

    Raises ValueError for a folder that holds no run, for a damaged file in one (with its line),
    and for a run that is given twice.
    """
    seen: set[Path] = set()
    for path in map(Path, runs):
        if path.resolve() in seen:
            raise ValueError(f"{path} is given twice; name each run once")
        seen.add(path.resolve())
    still_running = set(map(Path, running))
    records = [read_run(path, is_running=Path(path) in still_running) for path in runs]
    if len(records) == 1:
        page = _page_of_one(records[0], reload_s, thumbnail)
    else:
        page = _page_of_several(records, thumbnail, note)
    with replaced_file(out_path) as new:
        # File names may hold bytes that are not text.
        new.write_text(page.source, encoding="utf-8", errors="backslashreplace")


# --- pages ----------------------------------------------------------------------------------


def _page_of_one(
    run: RunRecord, reload_s: int, thumbnail: Callable[[str], Markup]
) -> Markup:
    names = run_facts.names([run])
    after = [join([f"After {counted(run.best_step, 'step')}"])] if run.best_step else []
    return _page(
        names[0],
        tag("p", run_facts.subtitle(run), class_="subtitle"),
        *_status(run),
        tag("p", run_facts.headline(run), class_="headline"),
        *_notices(run_facts.notices(run)),
        _section("Captions", *gallery(after, [run.images], thumbnail)),
        _section("Scores", *_scores(run)),
        _section("Curves", *charts([run], names), is_folded=True),
        _section("What was trained", _tiles(run), *_settings(run)),
        _section("Skipped images and rows", *_skipped(run)),
        _section("Environment", *_pairs(run_facts.versions_and_machine(run)), is_folded=True),
        footer=f"Generated from the files in {run.path}.",
        reload_s=reload_s if run.is_running else None,
    )


def _page_of_several(
    runs: Sequence[RunRecord], thumbnail: Callable[[str], Markup], note: str
) -> Markup:
    names = run_facts.names(runs)
    labels = [join([color_chip(run_color(index)), name]) for index, name in enumerate(names)]
    notices = [
        f"{name}: {notice}" for run, name in zip(runs, names)
        for notice in [*([] if run.is_finished else [run_facts.status(run)]),
                       *run_facts.notices(run)]
    ]
    pictures = gallery(labels, [run.images for run in runs], thumbnail)
    return _page(
        f"{len(runs)} runs compared",
        *([tag("pre", note)] if note else []),
        tag("ul", *(tag("li", label) for label in labels), class_="legend"),
        *_notices(notices),
        _section(
            "Captions of the same images",
            *(pictures or [tag("p", "The runs have no captioned images in common.")]),
        ),
        _section("Results", *_results(runs, labels)),
        _section("Settings", *_differences([run_facts.settings(run) for run in runs], labels)),
        _section("Curves", *charts(runs, names), is_folded=True),
        _section(
            "Environment",
            *_differences([run_facts.versions_and_machine(run) for run in runs], labels),
            is_folded=True,
        ),
        footer="Generated from the files in " + ", ".join(str(run.path) for run in runs) + ".",
    )


def _page(title: str, *content: Markup, footer: str, reload_s: int | None = None) -> Markup:
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        *([tag("meta", http_equiv="refresh", content=reload_s)] if reload_s else []),
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


def _section(title: str, *content: Markup, is_folded: bool = False) -> Markup:
    if not any(part.source for part in content):
        return join([])
    heading = tag("h2", title)
    if is_folded:
        return tag("section", tag("details", tag("summary", heading), *content))
    return tag("section", heading, *content)


def _status(run: RunRecord) -> list[Markup]:
    """Whether the run is still running; a process that is killed leaves a page that says so."""
    if not run.is_running:
        return [tag("p", run_facts.status(run), class_="" if run.is_finished else "notice")]
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    return [tag(
        "p",
        tag("strong", run_facts.status(run)),
        f" Written at {now}, and again at each validation; the page reloads itself.",
        class_="notice running",
    )]


def _notices(notices: Sequence[str]) -> list[Markup]:
    return [tag("p", notice, class_="notice") for notice in notices]


# --- figures and settings -------------------------------------------------------------------


def _tiles(run: RunRecord) -> Markup:
    tiles = [
        tag(
            "div",
            tag("dt", label),
            tag("dd", result.text, class_="figure"),
            tag("dd", result.remark, class_="remark"),
        )
        for label, result in run_facts.costs(run).items()
    ]
    return tag("dl", *tiles, class_="tiles") if tiles else join([])


def _scores(run: RunRecord) -> list[Markup]:
    """Loss and scores before training, with the best adapter, at the end, and with the best moving
    average."""
    losses = run.validation("loss")
    if not losses.steps:
        return []
    best_step, last_step = run.best_step, losses.steps[-1]
    columns = {"Before training": ("", losses.steps[0])}
    if best_step != losses.steps[0]:
        so_far = " so far" if run.is_running else ""
        columns[f"Best{so_far}, step {best_step:,}"] = ("", best_step)
    if ("", last_step) not in columns.values():
        columns[f"Last, step {last_step:,}"] = ("", last_step)
    if run.best_average_step is not None:
        name = f"Moving average, step {run.best_average_step:,}"
        columns[name] = (AVERAGE, run.best_average_step)
    rows = [
        (
            join([name, tag("small", run_facts.MEANINGS.get(key, ""))]),
            [
                run_facts.figure(run_facts.score_at(run, f"{prefix}{key}", step))
                for prefix, step in columns.values()
            ],
        )
        for key, name in {
            "loss": "Validation loss",
            **{key: run_facts.score_name(key) for key in run_facts.score_keys([run])},
        }.items()
    ]
    return [_table(list(columns), rows), tag("p", run_facts.scored(run), class_="hint")]


def _settings(run: RunRecord) -> list[Markup]:
    defaults = run_facts.default_settings()
    rows = [
        (key, [value, "" if defaults.get(key, value) == value else defaults[key]])
        for key, value in run_facts.settings(run).items()
    ]
    everything = _table(["This run", "Default of TrainingConfig, if different"], rows)
    return [
        *_pairs(run_facts.main_settings(run)),
        *([tag("details", tag("summary", "All settings"), everything)] if rows else []),
    ]


def _results(runs: Sequence[RunRecord], labels: Sequence[Markup]) -> list[Markup]:
    """A row for each figure; the best of the runs is bold if they can be ranked by it."""
    ranks_loss = run_facts.has_same_tokens(runs)
    found = [
        run_facts.outcome(run, ranks_loss=ranks_loss) | run_facts.costs(run) for run in runs
    ]
    rows = []
    for label in dict.fromkeys(label for results in found for label in results):
        row = [results.get(label, Result(NOTHING)) for results in found]
        values = [result.value for result in row if result.value is not None]
        better = row[0].better
        best = better(values) if better and len(set(values)) > 1 else None
        rows.append((label, [
            join([
                tag("strong" if result.value == best is not None else "span", result.text),
                tag("small", result.remark),
            ])
            for result in row
        ]))
    hint = "Bold: the best of the runs."
    if not ranks_loss:
        hint += (
            " The runs are not ranked by loss: it is a mean over tokens, and their tokenizers cut "
            "captions into different tokens."
        )
    return [_table(labels, rows), tag("p", hint, class_="hint")]


def _differences(tables: Sequence[Mapping[str, str]], labels: Sequence[Markup]) -> list[Markup]:
    """What differs between runs, and collapsed what does not."""
    keys = dict.fromkeys(key for table in tables for key in table)
    values = {key: [table[key] for table in tables if key in table] for key in keys}
    differing = [key for key in keys if len(set(values[key])) > 1]
    rows = [(key, [table.get(key, NOTHING) for table in tables]) for key in differing]
    same = {key: values[key][0] for key in keys if key not in differing}
    shown = [_table(labels, rows)] if rows else [tag("p", "No differences.")]
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
    rows: Sequence[tuple[Markup | str, Sequence[Markup | str]]],
) -> Markup:
    """A column per heading, and a row per label; a table wider than the page scrolls in its box."""
    head = tag("tr", tag("td"), *(tag("th", heading, scope="col") for heading in headings))
    body = [
        tag("tr", tag("th", label, scope="row"), *(tag("td", cell) for cell in cells))
        for label, cells in rows
    ]
    table = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", table, class_="scroll", tabindex=0)


def _skipped(run: RunRecord) -> list[Markup]:
    if not run.skipped:
        return []
    reasons = Counter(run.skipped.values()).most_common()
    rows = [(reason, [run_facts.count(number)]) for reason, number in reasons[:MAX_REASONS]]
    if len(reasons) > MAX_REASONS:
        rest = sum(number for _, number in reasons[MAX_REASONS:])
        rows.append(("other reasons", [run_facts.count(rest)]))
    paths = list(run.skipped)[:MAX_SKIPPED]
    title = "All of them" if len(paths) == len(run.skipped) else f"The first {len(paths)}"
    listed = tag("ul", *(tag("li", path) for path in paths))
    return [_table(["Number"], rows), tag("details", tag("summary", title), listed)]
