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
    """Milliseconds per token and per prompt on a GPU, with Hugging Face as the peer of each run."""
    runs_of = {backend: read(f"gpu_generation_{backend}")["models"] for backend in ("torch", "jax")}
    rows = []
    for name, model in runs_of["torch"].items():
        for key in model["keras-jamba"]:
            if not (key.startswith(("per token", "reading")) or key in ("load, s", "peak GiB")):
                continue
            row = [name, key]
            for found in runs_of.values():
                ours, theirs = (found[name][who][key] for who in ("keras-jamba", "Hugging Face"))
                row += [number(ours), number(theirs), number(theirs / ours, 2)]
            # Routing decides which experts a token reads: the bytes of all weights are no floor of that model.
            floor = name == "3B" and key.startswith("per token 1 ")
            rows.append([*row, number(model["floor, ms"], 2) if floor else None])
    titles = ["PyTorch", "Hugging Face", "ratio", "JAX", "Hugging Face", "ratio"]
    return markdown(["model", "rows x tokens", *titles, "floor"], rows)


@table
def soak():
    """The soak of generations with CUDA graphs."""
    found = read("soak_torch")
    keys = ("generations", "seconds", "requests", "seconds of threads")
    memory = [f"{found[f'MiB after {when}']:,.0f}" for when in ("a tenth", "all", "threads")]
    titles = ["generations", "seconds", "requests of 16 threads", "seconds", "graphs kept"]
    titles += [f"MiB after {when}" for when in ("a tenth", "all", "threads")]
    return markdown(titles, [[*(number(found[key]) for key in keys), found["graphs"], *memory]])


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
    return runs(*names, "gpu_generation_torch", "gpu_generation_jax", "soak_torch")
