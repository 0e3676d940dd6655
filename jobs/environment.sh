# Sourced after `. .venv/bin/activate` by scripts that start ranks on one machine (jobs/quickstart.sh, tests/run.sh).
# Settings of Open MPI's launcher; other launchers do not read them. What is already set stays.
if [ "$(id -u)" = 0 ]; then   # containers
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# More ranks than cores: allowed. The first is read by Open MPI 4, the second by 5.
export OMPI_MCA_rmaps_base_oversubscribe="${OMPI_MCA_rmaps_base_oversubscribe:-1}"
export PRTE_MCA_rmaps_default_mapping_policy="${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}"
# The Open MPI wheel outside a batch job: shared memory and TCP only, so that MPI_Init does not look for fabrics (1.5 s less).
if [ -z "${SLURM_JOB_ID:-}${PBS_JOBID:-}${LSB_JOBID:-}${FLUX_JOB_ID:-}" ] && [ -n "${VIRTUAL_ENV:-}" ] &&
   [ "$(command -v mpirun)" = "$VIRTUAL_ENV/bin/mpirun" ]; then
  export OMPI_MCA_pml="${OMPI_MCA_pml:-ob1}" OMPI_MCA_btl="${OMPI_MCA_btl:-self,sm,tcp}"
fi
