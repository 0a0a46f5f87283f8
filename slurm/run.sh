#!/bin/bash
# Inside an allocation: start a job, or go on with it after a requeue; ask for a requeue when it was stopped by a signal.
# The files *.sbatch become this script, so that Slurm's signal to the batch shell arrives here.
set -u

# A minute after the first rank has gone, however it went, the rest is ended. --kill-on-bad-exit=1 would be too quick: of
# ranks that leave with 75, the first would have the others killed, and the step would end with 143.
launcher=(srun --kill-on-bad-exit=0 --wait=60)
if [ "${1:-}" = sweep ]; then # a member of a sweep, which goes on by itself where its folder holds a run
    command=(python -m mpifed "$@" --index "$SLURM_ARRAY_TASK_ID" --ranks "$SLURM_NTASKS" --launcher "${launcher[*]}")
else
    out=runs/slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    for argument in "$@"; do
        case $argument in out=*) out=${argument#out=} ;; esac
    done
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$out/job.toml" ]; then
        set -- --resume "$out" # the folder's job.toml holds the job with its overrides
    else
        set -- "$@" "out=$out"
    fi
    command=("${launcher[@]}" python -m mpifed.run "$@")
fi

# Which PMI the ranks speak depends on the MPI library; a site that knows better sets SLURM_MPI_TYPE itself.
case $(mpirun --version 2>&1) in
    *HYDRA*) export SLURM_MPI_TYPE=${SLURM_MPI_TYPE:-pmi2} ;;
    *'Open MPI'*) export SLURM_MPI_TYPE=${SLURM_MPI_TYPE:-pmix} ;;
esac
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch by itself

"${command[@]}" &
child=$!
signalled=1
trap 'signalled=1; kill -USR1 $child' USR1 TERM # both ask for a checkpoint; srun passes USR1 on to the ranks
while [ $signalled -eq 1 ]; do # a signal ends `wait` before the child has ended
    signalled=0
    wait $child
    code=$?
done

if [ $code -eq 75 ]; then # checkpointed before the end
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
