"""The tables of docs/benchmarks/attention.md."""

from scripts.benchmark_tables.tables import BACKENDS, TITLES, markdown, number, read, runs, table


@table
def attention_cpu():
    """Time and memory in blocks, with the backend's own attention as the peer."""
    rows = []
    for backend in BACKENDS:
        found = {(r["length"], r["document"], r["implementation"]): r for r in read(f"attention_{backend}")["rows"]}
        for length, document, name in found:
            if name != "blocks":
                continue
            ours = found[length, document, "blocks"]
            peer = "fused" if document is None else "dense"
            theirs = found.get((length, document, peer))
            row = [
                TITLES[backend],
                f"{length:,}",
                f"{document or length:,}",
                number(ours["ms"]),
                f"{ours['MiB']:,}",
                peer,
            ]
            row += (
                [number(theirs["ms"]), f"{theirs['MiB']:,}", number(theirs["ms"] / ours["ms"], 2)]
                if theirs
                else [None] * 3
            )
            rows.append(row)
    titles = ["backend", "tokens", "per document", "`blocks`, ms", "MiB", "peer", "its ms", "its MiB", "speedup"]
    return markdown(titles, rows)


@table
def packed_steps():
    """Time and memory of a packed training step, beside the plain one."""
    rows = []
    for backend in BACKENDS:
        for row in read(f"packed_{backend}")["rows"]:
            size = f"{row['rows']} x {row['tokens']:,}"
            times = [number(row[f"{kind}, ms"]) for kind in ("plain", "packed")]
            memory = [f"{row[f'{kind}, MiB']:,}" for kind in ("plain", "packed")]
            rows.append([TITLES[backend], size, *times, number(row["packed / plain"]), *memory])
    titles = ["backend", "rows x tokens", "plain, ms", "packed, ms", "packed / plain", "plain, MiB", "packed, MiB"]
    return markdown(titles, rows)


@table
def attention_runs():
    files = [f"{kind}_{backend}" for kind in ("attention", "packed") for backend in BACKENDS]
    return runs(*files)
