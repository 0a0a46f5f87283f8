#!/bin/bash
# Inside an allocation: start a job, or go on with it after a requeue; ask for a requeue where it left before its end.
# The files *.sbatch become this script, so that Slurm's signal to the batch shell arrives here. docs/slurm.md
set -u

asked='' child=''
leave() {
    asked=yes interrupted=yes
    if [ -n "$child" ]; then
        say "asked to leave: the ranks finish their round and write a checkpoint"
        kill -USR1 "$child" # which every launcher passes on to the ranks
    fi
}
trap leave USR1 TERM # both ask for a checkpoint
say() { printf '[%(%F %T)T] %s\n' -1 "$*"; }

# --- what and where: a task of an array by its own name, for the number of its job may stand for the whole array
id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
ranks=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-1}))}
out=runs/slurm-$id sweep='' resume='' name='' before=''
for argument in "$@"; do
    case $argument in
        sweep) sweep=yes ;;
        --resume) resume=yes ;;
        out=*) out=${argument#out=} ;;
        *.toml) name=$(basename "$argument" .toml) ;;
    esac
    [ "$before" = --resume ] && out=$argument
    before=$argument
done
newest() { find "$out/checkpoints" -name 'round_*[0-9]' -printf '%f\n' 2>/dev/null | sort | tail -n 1; }
saved=$(newest)

# --- srun where it speaks what the MPI library understands, else mpirun; MPIFED_LAUNCHER=mpirun or srun decides
library=$(mpirun --version 2>&1)
case $library in
    *HYDRA*) library=MPICH pmi=pmi2 ;;
    *Intel*) library='Intel MPI' pmi=pmi2 ;;
    *'Open MPI'*) library='Open MPI' pmi=pmix ;;
    *) library='an unknown MPI' pmi='' ;;
esac
pmi=${SLURM_MPI_TYPE:-$pmi} # a site that knows better sets it itself
launcher=${MPIFED_LAUNCHER:-}
if [ -z "$launcher" ]; then
    launcher=mpirun
    [ -z "$pmi" ] && launcher=srun
    case " $(srun --mpi=list 2>&1 | tr -s '[:space:]' ' ') " in *" $pmi "*) launcher=srun ;; esac
fi
if [ "$launcher" = srun ]; then
    # A minute after the first rank has gone, however it went, the rest is ended. --kill-on-bad-exit=1 would be too
    # quick: of ranks that leave with 75, the first would have the others killed, and the step would end with 143.
    launch=(srun ${pmi:+--mpi=$pmi} --kill-on-bad-exit=0 --wait=60)
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch by itself
else
    launch=(mpirun) pmi=''
fi

if [ -n "$sweep" ]; then # a member of a sweep, which goes on by itself where its folder holds a run
    command=(python -m mpifed "$@" --index "$SLURM_ARRAY_TASK_ID" --ranks "$ranks" --launcher "${launch[*]}")
else
    if [ -z "$resume" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$out/job.toml" ]; then
        set -- --resume "$out" # the folder's job.toml holds the job with its overrides
    elif [ -z "$resume" ]; then
        set -- "$@" "out=$out"
    fi
    command=("${launch[@]}" -n "$ranks" python -m mpifed.run "$@")
fi

# --- for squeue, and for mpifed: a name, and the end of the job, by which a run leaves by itself
if [ "${SLURM_JOB_NAME:-}" = mpifed ] && [ -n "$name" ]; then
    scontrol update "JobId=$id" "JobName=$name" # one that was chosen stays
fi
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then # newer Slurms set it
    end=$(squeue --noheader --jobs="$id" --format=%e)
    SLURM_JOB_END_TIME=$(date --date="$end" +%s 2>/dev/null) || SLURM_JOB_END_TIME='' # of no limit, say
fi
export SLURM_JOB_END_TIME
say "job $id, start $((${SLURM_RESTART_COUNT:-0} + 1)): $ranks ranks on ${SLURM_JOB_NODELIST:-this node}," \
    "by $launcher of $library${pmi:+, $pmi}," \
    "until ${SLURM_JOB_END_TIME:+$(date --date="@$SLURM_JOB_END_TIME" '+%F %T')}"
say "${command[*]}"

# --- several ranks on one GPU: NVIDIA's MPS, a daemon a node, lets them compute at the same time
mps=''
if [ -n "${MPIFED_MPS:-}" ]; then
    export CUDA_MPS_PIPE_DIRECTORY=/tmp/mpifed-mps-$SLURM_JOB_ID CUDA_MPS_LOG_DIRECTORY=/tmp/mpifed-mps-$SLURM_JOB_ID
    if command -v nvidia-cuda-mps-control >/dev/null; then
        srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mpi=none \
            bash -c 'mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" && exec nvidia-cuda-mps-control -f' &
        mps=$!
    else
        say "no nvidia-cuda-mps-control on the path: the ranks take turns on their GPU"
    fi
fi

# --- run; a signal ends `wait` before the launcher has ended
code=75
if [ -z "$asked" ]; then
    "${command[@]}" &
    child=$!
    [ -n "$asked" ] && leave
    interrupted=yes
    while [ -n "$interrupted" ]; do
        interrupted=''
        wait $child
        code=$?
    done
    child=''
    # Before Python listens, a signal is the end of a rank; nothing is lost with it.
    [ -n "$asked" ] && case $code in 10 | 138) code=75 ;; esac
fi
[ -n "$mps" ] && kill $mps

# --- the end, or a requeue, asked for once; and not where Slurm is ending the job (scancel, a requeue of its own).
# After a death where that may help: with a new checkpoint, which ends as rounds do, or else the first three times.
state=$(squeue --noheader --jobs="$id" --format=%T)
why=''
case $code in
    75) why='left before its end (exit code 75)' ;;
    0) # as mpirun may return when a node is lost; a sweep looks for itself
        if [ -z "$sweep" ] && [ -f "$out/job.toml" ] && ! grep -qs '"complete": true' "$out/summary.json"; then
            code=1 why='exit code 0, but the run is not complete'
        fi
        ;;
    2 | 3 | 4) ;;
    *) why="died (exit code $code)" ;;
esac
if [ -z "$why" ]; then
    say "ended with exit code $code"
elif [ "$state" != RUNNING ]; then
    say "$why; Slurm is ending the job ($state), so no requeue is asked for"
elif [ $code -ne 75 ] && [ "$(newest)" = "$saved" ] && [ "${SLURM_RESTART_COUNT:-0}" -ge "${MPIFED_RESTARTS:-3}" ]; then
    say "$why; ${SLURM_RESTART_COUNT:-0} restarts, and this start saved nothing new: no requeue is asked for"
else
    say "$why: asking for a requeue"
    scontrol requeue "$id"
fi
exit $code
