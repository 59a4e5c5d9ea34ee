"""The tables of docs/benchmarks/decoding.md."""

from scripts.benchmark_tables.tables import BACKENDS, TITLES, markdown, number, read, runs, table


@table
def decode():
    """Tokens per second of greedy decoding, with Hugging Face as the peer."""
    rows = []
    for backend in BACKENDS:
        rates, row = read(f"decode_{backend}")["tokens a second"], [TITLES[backend]]
        for batch in (1, 8):
            ours, theirs = (rates[f"{name}, batch {batch}"] for name in ("keras-jamba", "Hugging Face"))
            row += [number(ours), number(theirs), number(ours / theirs, 2)]
        rows.append(row)
    titles = ["backend", "batch 1", "Hugging Face", "speedup", "batch 8", "Hugging Face", "speedup"]
    return markdown(titles, rows)


@table
def gpu_generation():
    """Milliseconds per token and per prompt on a GPU, with Hugging Face as the peer."""
    rows = []
    for name, model in read("gpu_generation_torch")["models"].items():
        ours, theirs = model["keras-jamba"], model["Hugging Face"]
        for key in ours:
            if key.startswith(("per token", "reading")) or key in ("load, s", "peak GiB"):
                floor = number(model["floor, ms"], 2) if key.startswith("per token 1 ") else None
                row = [name, key, number(ours[key]), number(theirs[key])]
                rows.append([*row, number(theirs[key] / ours[key], 2), floor])
    return markdown(["model", "rows x tokens", "PyTorch", "Hugging Face", "ratio", "floor"], rows)


@table
def long_contexts():
    """Milliseconds per token after contexts of several lengths."""
    documents = {backend: read(f"decode_{backend}")["contexts"] for backend in BACKENDS}
    lengths = sorted({key for rows in documents.values() for row in rows for key in row if key != "model"}, key=int)
    rows = []
    for backend, found in documents.items():
        for row in found:
            # The rate of the memory is a property of the machine. One run stands for all.
            if row["model"] == "reading keys and values" and backend != BACKENDS[-1]:
                continue
            times = [number(row[length], 2) if length in row else None for length in lengths]
            rows.append([TITLES[backend], row["model"], *times])
    return markdown(["backend", "model", *(f"{int(length):,} tokens" for length in lengths)], rows)


@table
def load():
    """Seconds and memory of loading a checkpoint, with transformers as the peer."""
    rows = []
    for backend in BACKENDS:
        found = read(f"load_{backend}")
        ours, theirs = (found["rows"][who] for who in ("ours", "theirs"))
        seconds = [each["load"] + each["forward"] for each in (ours, theirs)]
        row = [TITLES[backend], *(number(each[key]) for each in (ours, theirs) for key in ("load", "forward"))]
        rows.append([*row, number(seconds[0] / seconds[1]), number(ours["peak MB"] / found["MB"])])
    titles = ["backend", "load, s", "first call, s", "transformers, load, s", "first call, s", "time, ratio"]
    return markdown([*titles, "peak memory, copies of the file"], rows)


@table
def speculative():
    """Speedups of assistants over plain decoding, and accepted shares."""
    rows = []
    for backend in BACKENDS:
        found = read(f"speculative_{backend}")
        for kind in ("greedy", "sampled"):
            plain, *others = found[kind]
            row = [TITLES[backend], kind, number(plain["tokens a second"])]
            rows.append(row + [f"{other['times plain']:.2f} ({100 * other['accepted']:.1f} %)" for other in others])
    titles = ["backend", "decoding", "plain, tokens per second", "`PromptLookup(8)`", "`DraftModel(num_tokens=4)`"]
    return markdown(titles, rows)


@table
def speculative_training():
    """Size and training of the models of the speculative benchmark."""
    rows = []
    for backend in BACKENDS:
        found = read(f"speculative_{backend}")
        for name in ("model", "draft"):
            row = found[name]
            rows.append([TITLES[backend], name, f"{row['parameters']:,}", f"{row['seconds']:.0f}", row["steps"]])
            rows[-1].append(row["last loss"])
    return markdown(["backend", "model", "parameters", "training, s", "steps", "last loss"], rows)


@table
def decoding_runs():
    names = [f"{kind}_{backend}" for kind in ("decode", "load", "speculative") for backend in BACKENDS]
    return runs(*names, "gpu_generation_torch")
