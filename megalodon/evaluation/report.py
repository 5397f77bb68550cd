"""An evaluation as a document, tables and words: the same for the terminal, the Markdown report and JSON.

    {"suite", "norm_stats", "dtype", "device", "data": {…}, "truncated_tokens", "seconds", "version",
     "models": [{"name", "path", "weights_sha256", …, "quick": {…}, "context": {…}, "recall": {…}, …}],
     "comparisons": [{"model", "against", …}]}

Not here: what is computed (scoring.py and its neighbours), printing and files (megalodon_cli/evaluation_screen.py).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megalodon.config import count_name
from megalodon.evaluation.answers import wilson

Document = Mapping[str, Any]
Table = list[list[str]]
BAR = 24
"""Characters of the longest bar."""


def heading(document: Document) -> str:
    """What every report says first: policy, precision, text."""
    data = document["data"]
    text = f" · {data['name']} ({data['sha256'][:8]})" if data else ""
    return (
        f"evaluate {document['suite']} · norm_stats {document['norm_stats']} · {document['dtype']} on "
        f"{document['device']}{text} · {document['truncated_tokens']:,} tokens truncated"
    )


def tables(document: Document) -> Iterator[tuple[str, Table]]:
    """Yield every table with its title; the first row is the header."""
    models = document["models"]
    if scored := [model for model in models if "quick" in model]:
        yield "scores", _scores(scored)
        yield "loss by position, nats a token", _by_position(scored)
    if differences := [c for c in document["comparisons"] if "bits_per_byte" in c]:
        yield f"bits/byte less that of {models[0]['name']}, paired", _differences(differences, models)
    for model in models:
        if "context" in model:
            yield f"{model['name']}: loss after a length of context, nats a token", _context(model["context"])
            yield f"{model['name']}: loss by position in the window", _in_window(model["context"])

    if differences := [c for c in document["comparisons"] if "lengths" in c]:
        title = f"loss less that of {models[0]['name']} on the same windows, nats a token"
        yield title, _context_differences(differences)
    for model in models:
        if "recall" in model:
            yield f"{model['name']}: recall, % of samples", _recall(model["recall"])
    if "qa" in models[0]:
        yield "questions, answers that are exactly right", _questions(models)
    if "harness" in models[0]:
        yield "tasks", _tasks(models)


def words(document: Document) -> Iterator[str]:
    """Yield what the numbers say, in sentences."""
    for model in document["models"]:
        if "quick" in model:
            found = model["quick"]
            yield (
                f"{model['name']}: {found['tokens']:,} tokens scored once, {found['documents']:,} first tokens of a "
                f"document read; errors draw {found['units']:,} {found['drawn']}"
            )
            yield from _beyond(model)
        if "context" in model:
            yield from _used(model["name"], model["context"], model.get("seq_len"))
    for found in document["comparisons"]:
        if "bits_per_byte" in found:
            yield _verdict(found)
    if any("recall" in model for model in document["models"]):
        yield "recall is reported, not promised: exact is greedy decoding; of first, chance is 10 %"
    for name in document["cutting_tasks"]:
        yield f"task {name} drops or cuts long examples by itself"


def markdown(document: Document) -> str:
    """The report."""
    lines = [f"# {heading(document)}", ""]
    for model in document["models"]:
        lines.append(
            f"- {model['name']}: `{model['path']}`, {model['parameters']:,} parameters, weights "
            f"`{model['weights_sha256'][:16]}`"
        )
    for title, rows in tables(document):
        lines += ["", f"## {title}", "", f"| {' | '.join(rows[0])} |", f"|{' --- |' * len(rows[0])}"]
        lines += [f"| {' | '.join(row)} |" for row in rows[1:]]
    lines += ["", *(f"- {text}" for text in words(document))]
    return "\n".join(lines) + "\n"


def bars(document: Document) -> Iterator[str]:
    """Yield what context gains over a reset as bars of text."""
    for model in document["models"]:
        rows = model["context"]["lengths"][1:] if "context" in model else ()
        most = max((-row["less_reset"]["value"] for row in rows), default=0.0)
        if most <= 0:
            continue
        width = max(len(count_name(row["context"])) for row in rows)
        yield f"\n{model['name']}: nats a token gained over a reset, by tokens of context"
        for row in rows:
            gain = -row["less_reset"]["value"]
            yield f"  {count_name(row['context']):>{width}} │{'█' * round(BAR * max(0.0, gain) / most)} {gain:.4f}"


def _scores(models: Sequence[Document]) -> Table:
    rows = [["model", "loss", "perplexity", "bits/byte", "bits/word", "word perplexity", "tokens", "bytes"]]
    for model in models:
        found = model["quick"]
        rows.append(
            [
                model["name"],
                with_error(found["loss"]),
                _number(found["perplexity"]),
                with_error(found["bits_per_byte"]),
                with_error(found["bits_per_word"]),
                _number(found["word_perplexity"]),
                f"{found['tokens']:,}",
                f"{found['bytes']:,}",
            ]
        )
    return rows


def _differences(found: Sequence[Document], models: Sequence[Document]) -> Table:
    first = models[0]["quick"]["bits_per_byte"]["value"]
    rows = [["model", "difference", "of it", "units"]]
    for own in found:
        change = own["bits_per_byte"]
        share = f"{change['value'] / first:+.2%}" if first else "-"
        rows.append([own["model"], _change(change), share, f"{own['units']:,} {own['drawn']}"])
    return rows


def _verdict(found: Document) -> str:
    change, names = found["bits_per_byte"], (found["model"], found["against"])
    if change["low"] is None:
        return f"{names[0]} and {names[1]}: of {found['units']:,} {found['drawn']} no interval is drawn"
    if change["low"] <= 0 <= change["high"]:
        return f"{names[0]} and {names[1]} differ by no more than chance: {_change(change)} bits/byte"
    better, worse = names if change["value"] < 0 else names[::-1]
    return f"{better} is better than {worse} by {abs(change['value']):.4f} bits/byte beyond chance"


def _context_differences(found: Sequence[Document]) -> Table:
    rows = [["context", *(own["model"] for own in found)]]
    for k, row in enumerate(found[0]["lengths"]):
        name = count_name(row["context"]) if row["context"] else "reset"
        rows.append([name, *(_change(own["lengths"][k]["loss"]) for own in found)])
    return rows


def _by_position(models: Sequence[Document]) -> Table:
    ends = sorted({int(end) for model in models for end in model["quick"]["by_position"]})
    rows = [["up to token", *(model["name"] for model in models)]]
    for end in ends:
        found = [model["quick"]["by_position"].get(str(end)) for model in models]
        mark = "".join(" (training length)" for m in models[:1] if m.get("seq_len") and end // 2 < m["seq_len"] <= end)
        rows.append([f"{count_name(end)}{mark}", *("-" if own is None else f"{own['loss']:.4f}" for own in found)])
    return rows


def _context(found: Document) -> Table:
    rows = [["context", "loss", "bits/byte", "less reset", "less shortest", "less previous"]]
    for row in found["lengths"]:
        bits = row["bits_per_byte"]
        rows.append(
            [
                count_name(row["context"]) if row["context"] else "reset",
                with_error(row["loss"]),
                "-" if bits is None else f"{bits:.4f}",
                *(_change(row[key]) for key in ("less_reset", "less_shortest", "less_previous")),
            ]
        )
    return rows


def _in_window(found: Document) -> Table:
    lengths = found["lengths"]
    rows = [["up to token", *(count_name(row["context"]) if row["context"] else "reset" for row in lengths)]]
    for end in lengths[0]["by_position"]:
        rows.append([count_name(int(end)), *(f"{row['by_position'][end]:.4f}" for row in lengths)])
    return rows


def _used(name: str, found: Document, seq_len: int | None) -> Iterator[str]:
    used, lengths = found["used_tokens"], [row["context"] for row in found["lengths"]]
    longest = lengths[-1]
    trained = f"; it was trained on windows of {count_name(seq_len)}" if seq_len else ""
    many = f"{found['windows']:,} windows, 95 % intervals"
    if used:
        beyond = "" if used == longest else f", and nothing longer up to {count_name(longest)} helps beyond chance"
        shorter = max(length for length in lengths if length < used)
        least = f"more than {count_name(shorter)} and " if shorter else ""
        yield f"{name} uses text {least}up to {count_name(used)} tokens back{beyond} ({many}){trained}"
    else:
        yield f"{name}: no length up to {count_name(longest)} helps beyond chance ({many}){trained}"
    if found["worse_at"]:
        worse = ", ".join(count_name(length) for length in found["worse_at"])
        yield f"{name}: with {worse} tokens of context it is worse than with the length before"


def _beyond(model: Document) -> Iterator[str]:
    """How the loss goes on beyond the training length: a line through its buckets, by their tokens."""
    seq_len, buckets = model.get("seq_len"), model["quick"]["by_position"]
    if not seq_len:
        return
    beyond = [
        (math.log2(int(end)), own["loss"], own["tokens"]) for end, own in buckets.items() if int(end) >= 2 * seq_len
    ]
    if len(beyond) < 2:
        return
    total = sum(weight for *_, weight in beyond)
    x, y = (sum(row[k] * row[2] for row in beyond) / total for k in (0, 1))
    slope = sum(w * (a - x) * (b - y) for a, b, w in beyond) / sum(w * (a - x) ** 2 for a, _, w in beyond)
    yield (
        f"{model['name']}: beyond its training length of {count_name(seq_len)} tokens the loss changes by {slope:+.4f} "
        "nats a token with every doubling of the position; other documents, or parts of them, stand there"
    )


def _recall(found: Document) -> Table:
    """A row for each task and length: exact, first, and first at each depth."""
    depths = sorted({cell["depth"] for cell in found["cells"] if cell["depth"] is not None})
    rows = [["task", "tokens", "exact", "first", *(f"first at {depth:.0%}" for depth in depths), "samples"]]
    grouped: dict[tuple[str, int], list[Document]] = {}
    for cell in found["cells"]:
        grouped.setdefault((cell["task"], cell["length"]), []).append(cell)
    for (task, length), cells in grouped.items():
        samples, at = sum(cell["samples"] for cell in cells), {cell["depth"]: cell["first"]["value"] for cell in cells}
        pooled = (
            wilson(round(sum(c[key]["value"] * c["samples"] for c in cells)), samples) for key in ("exact", "first")
        )
        by_depth = (f"{at[depth]:.0%}" if depth in at else "-" for depth in depths)
        rows.append([task, count_name(length), *map(_share, pooled), *by_depth, f"{samples}"])
    return rows


def _questions(models: Sequence[Document]) -> Table:
    rows = [["model", "exact", "questions", "without answer"]]
    for model in models:
        found = model["qa"]
        rows.append([model["name"], _share(found["exact"]), f"{found['questions']:,}", f"{found['without_answer']:,}"])
    return rows


def _tasks(models: Sequence[Document]) -> Table:
    rows = [["task", "metric", "filter", "few-shot", "samples", *(model["name"] for model in models)]]
    for number, row in enumerate(models[0]["harness"]["rows"]):
        own = (model["harness"]["rows"][number] for model in models)
        values = ("-" if r["value"] is None else with_error(r) for r in own)
        counts = ("-" if row[key] is None else f"{row[key]}" for key in ("num_fewshot", "samples"))
        rows.append([row["task"], row["metric"], row["filter"], *counts, *values])
    return rows


def _share(share: Document) -> str:
    return f"{share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}]"


def with_error(interval: Document | None) -> str:
    """A value with its standard error."""
    if interval is None:
        return "-"
    error = interval["error"]
    return f"{interval['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _change(interval: Document | None) -> str:
    if interval is None:
        return "-"
    ends = "" if interval["low"] is None else f" [{interval['low']:+.4f}, {interval['high']:+.4f}]"
    return f"{interval['value']:+.4f}{ends}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"
