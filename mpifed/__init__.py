"""mpifed: federated learning by knowledge distillation over MPI.

Importing this package sets, before MPI starts, the variables that make a waiting rank give up its core
(docs/mpi.md); each keeps a value that the user has set already.
"""

import os

__version__ = "0.1.0"

for _name, _value in {
    "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1",  # MPICH: yield between polls
    "OMPI_MCA_mpi_yield_when_idle": "1",  # Open MPI under srun does not see that it is oversubscribed
    "OMPI_MCA_osc": "^ucx",  # silences a component that only prints a warning
}.items():
    os.environ.setdefault(_name, _value)
