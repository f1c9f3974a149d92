"""A small report.json with something in most of its tables."""


def replacement_row(method, loop, mode, k, delta, layers=("blocks.1.x", "blocks.3.x")):
    return {
        "method": method,
        "loop": loop,
        "mode": mode,
        "layers": list(layers),
        "k": k,
        "active_total": 8,
        "ce_clean": 3.0,
        "ce": 3.0 + delta,
        "delta_ce": delta,
        "ce_recovered_zero": 0.9,
        "ce_recovered_mean": 0.8,
        "kl": delta,
        "tokens": 1000,
    }


def report_of(**changes):
    rows = [
        replacement_row(method, loop, mode, k, 1.0 / k if k else 0.5)
        for mode in ("online", "teacher_forced", "error_added")
        for method, loop, ks in (
            ("raw", None, (4, 8)),
            ("resae", "closed", (4, 8)),
            ("affine_only", None, (None,)),
        )
        for k in ks
    ]
    rows.append(replacement_row("raw", None, "teacher_forced", 4, 9.99, layers=("blocks.3.x",)))
    log = [
        {"step": s, "tokens": 100 * s, "layers": [{"fvu": 1 / s}, {"fvu": 1 / s}]} for s in (1, 2)
    ]
    redundancy = {
        "mean_max_cos": 0.5,
        "share_over_0_5": 0.4,
        "share_over_0_7": 0.1,
        "share_over_0_9": 0.0,
        "random_floor": 0.3,
    }
    return {
        "schema_version": 1,
        "title": "A <test> report",
        "config": {
            "model": "m",
            "data": "d",
            "layers": ["blocks.1.x", "blocks.3.x"],
            "d_sae": 64,
            "train_tokens": 1000,
        },
        "environment": {"torch": "2"},
        "replacement": rows,
        "reconstruction": [
            {
                "method": "raw",
                "loop": None,
                "k": 4,
                "layer": "blocks.1.x",
                "fvu_stream": 0.1234,
                "fvu_target": None,
                "l0": 4.0,
                "dead_fraction": 0.0,
            }
        ],
        "redundancy": [{"method": "raw", "k": 4, **redundancy}],
        "redundancy_histogram": [
            {"method": "raw", "k": 4, "edges": [0.0, 0.5, 1.0], "counts": [3, 1]}
        ],
        "affine": [{"method": "resae", "hop": "blocks.1.x → blocks.3.x", "r2": 0.87}],
        "training": [{"method": "raw", "k": 4, "log": log}],
        "samples": [{"how": "plain", "prompt": "p <b>", "text": "t & u", "replaced": 0}],
        "findings": ["ReSAE < raw"],
        **changes,
    }
