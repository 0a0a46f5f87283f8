"""The algorithms by name; one file a paper. A name with a colon is the user's own: `"my.module:Class"`."""

ALGORITHMS: dict[str, str] = {
    "fedavg": "mpifed.algorithms.fedavg:FedAvg",
    "fedprox": "mpifed.algorithms.fedprox:FedProx",
    "scaffold": "mpifed.algorithms.scaffold:Scaffold",
    "feddyn": "mpifed.algorithms.feddyn:FedDyn",
    "fedftg": "mpifed.algorithms.fedftg:FedFTG",
    "fd": "mpifed.algorithms.fd:FD",
    "faug": "mpifed.algorithms.faug:FAug",
    "feddistill": "mpifed.algorithms.feddistill:FedDistill",
    "feddistill_plus": "mpifed.algorithms.feddistill:FedDistillPlus",
    "fedkd": "mpifed.algorithms.fedkd:FedKD",
    "fedmd": "mpifed.algorithms.fedmd:FedMD",
    "fedgen": "mpifed.algorithms.fedgen:FedGen",
    "fedensemble": "mpifed.algorithms.fedensemble:FedEnsemble",
    "feddf": "mpifed.algorithms.feddf:FedDF",
    "local": "mpifed.algorithms.local:Local",
    "pooled": "mpifed.algorithms.local:Pooled",
}
