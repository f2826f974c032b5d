#!/usr/bin/env bash
# Hosts on one machine: network namespaces with slow links between them, over which mpirun starts a command.
#
#   tests/support/testbed.sh --hosts 4 --rate 1gbit [--ranks-per-host 1] [--mpi openmpi] [--once] -- CMD [ARGS...]
#
#   --hosts N            1 to 16: h1, h2, ... each with its own name, link and shared memory; ranks go round them
#   --rate RATE          of every link, each way, as tc writes it: 1gbit, 100mbit
#   --ranks-per-host K   how many ranks a host has
#   --mpi openmpi|mpich  whose mpirun or mpiexec is taken; it has to be the first on PATH
#   --once               CMD is started once, on h1, and starts Open MPI's ranks itself, with mpirun --host h1:K,h2:K
#
# It takes root, iproute2 and util-linux. The exit code is that of mpirun; 2: wrong arguments or no such MPI; 77: this
# machine cannot do it, and why. Files, working directory and environment are the caller's on every host. Anything that
# runs on one can do something to another: /proc/1/root/dev/shm/enter h2 ip link set eth0 down.
#
# There is nothing to clean up, not even after SIGKILL. No namespace has a name, so the kernel drops it, its links and
# its mounts with the last process inside; all processes are in one process namespace, which the kernel ends with its
# first process, and that one dies with this script. For the same reason testbeds do not see each other.
#
# Open MPI has to be 5 or newer. The wheels of both MPIs overwrite each other's mpirun, but beside one in a venv the
# other can be in a folder of its own. mpi4py has modules for both, and takes the library that MPI4PY_LIBMPI names;
# unless it is set, --mpi mpich names DIR/lib/libmpi.so.12:
#
#   pip install --prefix DIR --no-deps mpich
#   PATH=DIR/bin:$PATH tests/support/testbed.sh --mpi mpich ...
#
# What the ranks are told here are defaults: OMPI_MCA_*, MPIR_CVAR_* and the like from outside win.

# shellcheck disable=SC2016 # what stands in single quotes is for another shell
set -euo pipefail

box=/proc/1/root/dev/shm # of the first process, from whatever host one looks
isolated=(unshare --net --mount --mount-proc --pid --fork --kill-child)
into=(nsenter --net --uts --ipc --mount --target) # and a host's process

die() { # exit code, reason
  echo "testbed: $2" >&2
  exit "$1"
}

parse() {
  hosts="" rate="" per_host=1 mpi=openmpi once=""
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) sed -n '2,/^$/s/^# \?//p' "${BASH_SOURCE[0]}" && exit ;;
      --hosts) hosts=${2-} ;;
      --rate) rate=${2-} ;;
      --ranks-per-host) per_host=${2-} ;;
      --mpi) mpi=${2-} ;;
      --once) once=1 && shift && continue ;;
      --) break ;;
      *) die 2 "what is $1? --help lists what there is" ;;
    esac
    shift $(($# > 1 ? 2 : 1))
  done
  [[ $hosts =~ ^([1-9]|1[0-6])$ ]] || die 2 "--hosts takes 1 to 16, not '$hosts'"
  [[ $per_host =~ ^[1-9][0-9]?$ ]] || die 2 "--ranks-per-host takes 1 to 99, not '$per_host'"
  [[ $mpi =~ ^(openmpi|mpich)$ ]] || die 2 "--mpi takes openmpi or mpich, not '$mpi'"
  [ -z "$once" ] || [ "$mpi" = openmpi ] || die 2 "--once goes with --mpi openmpi"
  [ -n "$rate" ] || die 2 "--rate is missing"
  [ $# -gt 1 ] || die 2 "no command: -- CMD [ARGS...]"
  shift
  command=("$@")
}

check_machine() { # sets rate_Bps; what it tries is gone when it has been tried
  local program code=0 said
  [ "$(id -u)" = 0 ] || die 77 "network namespaces take root"
  for program in ip tc unshare nsenter setpriv; do
    command -v "$program" >/dev/null || die 77 "no $program on PATH; Debian has it in iproute2 or util-linux"
  done
  said=$("${isolated[@]}" sh -ec '
    mount -t tmpfs testbed /dev/shm
    ip link add bridge type bridge
    ip link add left type veth peer name right
    tc qdisc add dev left root tbf rate 1mbit burst 16kb limit 16kb
    tc qdisc replace dev left root tbf rate "$0" burst 16kb limit 16kb || exit 9
    tc -j qdisc show dev left
  ' "$rate" 2>&1) || code=$?
  [ $code != 9 ] || die 2 "--rate $rate: ${said%%$'\n'*}"
  [ $code = 0 ] || die 77 "no namespaces with bridge, veth and tbf: ${said%%$'\n'*}"
  [[ $said =~ \"rate\":([0-9]+) ]] || die 77 "tc does not say what it has set: $said"
  rate_Bps=${BASH_REMATCH[1]}
}

check_mpi() {
  local name=mpirun is="Open MPI. [5-9]" version
  [ "$mpi" = openmpi ] || name=mpiexec is="HYDRA"
  version=$("$name" --version 2>&1) || true
  [[ $version =~ $is ]] || die 2 "--mpi $mpi: the first $name on PATH is another's: $(command -v "$name" || echo none)"
}

between() { # low, value, high
  echo $(($2 < $1 ? $1 : $2 > $3 ? $3 : $2))
}

# From here on: the first process of its namespaces.

inside() {
  mount -t tmpfs testbed /dev/shm
  # 2 ms at full speed, or the timer costs throughput; and no packet that offloading has put together may exceed it.
  local burst number
  burst=$(between 16384 $((rate_Bps / 500)) 16777216)
  gso=$(between 1 $((burst / 2)) 65536)
  shape="tbf rate ${rate_Bps}bps burst $burst limit $(between 131072 $((rate_Bps / 50)) 268435456)"
  ip link add bridge type bridge
  ip link set bridge up
  {
    echo "127.0.0.1 localhost"
    for ((number = 1; number <= hosts; number++)); do echo "10.77.0.$number h$number"; done
  } >$box/hosts
  mount --bind $box/hosts /etc/hosts
  for ((number = 1; number <= hosts; number++)); do add_host $number; done
  write_enter
  # What an outer launcher would tell ours.
  unset "${!OMPI_COMM_@}" "${!PMIX_@}" "${!PMI_@}" "${!SLURM_@}"
  # Each host believes that all cores are its own; threads that wait for each other give theirs away.
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY-PASSIVE}"
  "launch_$mpi"
}

add_host() { # number
  local pid
  # The host is a process that sleeps. reno, because namespaces may not choose cubic, and not all kernels have bbr.
  read -r pid < <("${isolated[0]}" --net --uts --ipc --mount sh -ec '
    echo "h$1" >/proc/sys/kernel/hostname
    echo reno >/proc/sys/net/ipv4/tcp_congestion_control
    [ ! -e /proc/sys/net/ipv6 ] || echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6
    mount -t tmpfs "h$1" /dev/shm
    ip link set lo up
    ip link add eth0 type veth peer name "h$1" netns 1
    ip link set eth0 gso_max_size "$2" up
    ip address add "10.77.0.$1/24" dev eth0
    tc qdisc add dev eth0 root $3
    echo $$
    exec sleep infinity >/dev/null
  ' sh "$1" "$gso" "$shape") || die 1 "cannot make host h$1"
  echo "$pid" >"$box/h$1"
  # shellcheck disable=SC2086 # words
  tc qdisc add dev "h$1" root $shape
  ip link set "h$1" master bridge up
}

write_enter() { # the ssh of this place
  cat >$box/enter <<END
#!/usr/bin/env bash
# HOST COMMAND...
host=\$1
shift
exec ${into[*]} "\$(cat $box/\$host)" bash -c "\$*"
END
  chmod +x $box/enter
}

on_first_host() {
  "${into[@]}" "$(cat $box/h1)" sh -c 'cd "$0" && exec "$@"' "$PWD" "$@"
}

list() { # h1, h2, ... each with this ending
  local names
  names=$(printf "h%d$1," $(seq "$hosts"))
  echo "${names%,}"
}

# Nothing is said about interfaces: a host has only eth0. Other transports would find shared memory where there is none
# on real hosts. Ranks yield, since there are more of them than cores.

launch_openmpi() {
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  # Not in /tmp: that is one for all, and process ids, by which such folders are named, repeat in each testbed.
  export PRTE_MCA_prte_tmpdir_base=/dev/shm PRTE_MCA_plm=ssh PRTE_MCA_plm_ssh_agent=$box/enter
  export OMPI_MCA_pml="${OMPI_MCA_pml-ob1}" OMPI_MCA_btl="${OMPI_MCA_btl-self,sm,tcp}"
  export OMPI_MCA_mpi_yield_when_idle="${OMPI_MCA_mpi_yield_when_idle-1}"
  if [ -n "$once" ]; then
    on_first_host "${command[@]}"
    return
  fi
  on_first_host mpirun --host "$(list ":$per_host")" --map-by node:oversubscribe --bind-to none \
    -n $((hosts * per_host)) "${command[@]}"
}

launch_mpich() {
  local library
  library=$(dirname "$(dirname "$(command -v mpiexec)")")/lib/libmpi.so.12
  [ -n "${MPI4PY_LIBMPI-}" ] || [ ! -e "$library" ] || export MPI4PY_LIBMPI="$library"
  export MPIR_CVAR_CH4_NETMOD="${MPIR_CVAR_CH4_NETMOD-ofi}" FI_PROVIDER="${FI_PROVIDER-tcp}"
  export UCX_TLS="${UCX_TLS-tcp,self}"
  # rsh differs from ssh only in that no -x comes before the host.
  on_first_host mpiexec -launcher rsh -launcher-exec $box/enter -hosts "$(list "")" -ppn 1 \
    -n $((hosts * per_host)) "${command[@]}"
}

if [ "${1-}" = --inside ]; then
  rate_Bps=$2
  shift 2
  parse "$@"
  inside
  exit
fi
parse "$@"
check_machine
check_mpi
# In the background, because a signal ends only a script that does not wait for a command. The parent is looked at once
# it can no longer die unnoticed.
env --default-signal=INT,QUIT setpriv --pdeathsig KILL sh -c '[ "$PPID" = "$0" ] && exec "$@"' $$ \
  "${isolated[@]}" "$BASH" "${BASH_SOURCE[0]}" --inside "$rate_Bps" "$@" <&0 &
wait $!
