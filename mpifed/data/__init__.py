"""Data sets and how they are dealt to clients: the names that a job may use, and where each is found.

A name stands for a callable whose keyword-only parameters are the keys of the job's `[data]` table (sources) or
`[data.partition]` table (partitions). `"my.module:Name"` in a job names one's own in the same way.
"""

from __future__ import annotations

SOURCES: dict[str, str] = {
    "digits": "mpifed.data.hdf5:digits",
    "hdf5": "mpifed.data.hdf5:HDF5Source",
    "mnist": "mpifed.data.idx:mnist",
    "fashion_mnist": "mpifed.data.idx:fashion_mnist",
    "emnist": "mpifed.data.idx:emnist",
    "cifar10": "mpifed.data.vision:cifar10",
    "cifar100": "mpifed.data.vision:cifar100",
    "svhn": "mpifed.data.vision:svhn",
    "ade_corpus": "mpifed.data.text:ade_corpus",
    "sst2": "mpifed.data.text:sst2",
    "trec": "mpifed.data.text:trec",
    "sms_spam": "mpifed.data.text:sms_spam",
    "synthetic": "mpifed.data.synthetic:Synthetic",
}
"""Callables that return a `mpifed.data.source.Source`."""

PARTITIONS: dict[str, str] = {
    "iid": "mpifed.data.partition:iid",
    "dirichlet": "mpifed.data.partition:dirichlet",
    "dirichlet_prior": "mpifed.data.partition:dirichlet_prior",
    "shards": "mpifed.data.partition:shards",
    "labels": "mpifed.data.partition:labels_per_client",
    "quantity": "mpifed.data.partition:quantity",
    "fedgen": "mpifed.data.partition:fedgen",
    "per_class": "mpifed.data.partition:per_class",
    "target_labels": "mpifed.data.partition:target_labels",
    "natural": "mpifed.data.partition:natural",
}
"""Functions `(labels, clients, rng, test_labels, *, <keys of the job>) -> mpifed.data.partition.Partition`."""
