"""The tables of docs/benchmarks/attention.md."""

from scripts.benchmark_tables.tables import BACKENDS, TITLES, markdown, number, read, runs, table

_ON_GPU = ("jax", "torch")


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
    """Time of packed training steps on a CPU as a multiple of the plain one, and the memory of both."""
    return _packed("packed", BACKENDS)


@table
def packed_steps_gpu():
    """Time of packed training steps on a GPU as a multiple of the plain one, and the memory of both."""
    return _packed("gpu_packed", _ON_GPU)


def _packed(file, backends):
    rows = []
    for backend in backends:
        found = {(r["rows"], r["tokens"], r["document"]): r for r in read(f"{file}_{backend}")["rows"]}
        lengths = sorted({document for *_, document in found if document})
        for count, tokens in dict.fromkeys(key[:2] for key in found):
            plain, *packed = (found[count, tokens, document] for document in (None, *lengths))
            row = [TITLES[backend], f"{count} x {tokens:,}", number(plain["ms"])]
            row += [number(each["packed / plain"]) for each in packed]
            rows.append(row + [f"{plain['MiB']:,}", *(f"{each['MiB']:,}" for each in packed if "MiB" in each)])
    documents = [f"{length:,} per document" for length in lengths]
    return markdown(["backend", "rows x tokens", "plain, ms", *documents, "plain, MiB", "packed, MiB"], rows)


@table
def windows():
    """Time and memory of attention with a window and sinks, per length."""
    rows = [
        [TITLES[backend], f"{row['tokens']:,}", number(row["ms"]), number(row["us per token"]), f"{row['MiB']:,}"]
        for backend in BACKENDS
        for row in read(f"windows_{backend}")["rows"]
    ]
    return markdown(["backend", "tokens", "ms", "µs per token", "MiB"], rows)


@table
def new_token_gpu():
    """Time of attention of one new token on a GPU, beside the reading of its cache."""
    rows = []
    for backend in _ON_GPU:
        found = [row for row in read(f"attention_gpu_{backend}")["rows"] if "cache" in row]
        device = {(*_heads(row), row["cache"], row["implementation"]): row["device ms"] for row in found}
        for *shape, cache in dict.fromkeys(key[:-1] for key in device):
            ours, dense, reading = (1e3 * device[*shape, cache, name] for name in ("split_keys", "dense", "reading"))
            row = [TITLES[backend], _shape(*shape), f"{cache:,}", number(ours), number(dense), number(reading)]
            rows.append([*row, number(ours / reading)])
    titles = ["backend", "rows, heads x width", "tokens in the cache", "`split_keys`, µs", "`dense`, µs", "reading, µs"]
    return markdown([*titles, "`split_keys` / reading"], rows)


@table
def attention_gpu():
    """Time of attention with its gradient on a GPU, beside the backend's own."""
    names = ("tokens", "document", "window", "implementation")
    found = [row for row in read("attention_gpu_torch")["rows"] if "tokens" in row]
    device = {(*_heads(row), *(row[name] for name in names)): row["device ms"] for row in found}
    rows = []
    for (*shape, tokens, document, window, name), ours in device.items():
        if name != "triton":
            continue
        peer = "dense" if document or window else "fused"
        theirs = device.get((*shape, tokens, document, window, peer))
        row = [f"{_shape(*shape)}, {tokens:,}", document and f"{document:,}", window, number(ours), peer]
        rows.append([*row, *([number(theirs), number(theirs / ours)] if theirs else [None] * 2)])
    titles = ["rows, heads x width, tokens", "per document", "window", "`triton`, ms", "peer", "its ms", "speedup"]
    return markdown(titles, rows)


def _heads(row):
    return tuple(row[name] for name in ("rows", "heads", "kv_heads", "width"))


def _shape(rows, heads, kv_heads, width):
    return f"{rows}, {heads} / {kv_heads} x {width}"


@table
def attention_runs():
    found = [*(f"attention_{backend}" for backend in BACKENDS), *(f"packed_{backend}" for backend in BACKENDS)]
    found += [f"windows_{backend}" for backend in BACKENDS]
    found += [f"{kind}_{backend}" for kind in ("attention_gpu", "gpu_packed") for backend in _ON_GPU]
    return runs(*found)
