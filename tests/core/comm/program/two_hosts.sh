#!/bin/sh
# Runs ranks on two hosts that are network namespaces on this machine, joined by a pair of virtual Ethernet devices:
#   two_hosts.sh RANKS_PER_HOST CUT MPIRUN_ARGUMENTS... PROGRAM ARGUMENTS...
# CUT=cut takes the link down once the program has written "running". Exit 77: namespaces are not permitted here.
# All of it lives in namespaces of its own, so that nothing is left when it ends.
if [ "$TWO_HOSTS_INSIDE" != 1 ]; then
  unshare --user --map-root-user --net --mount --uts --pid --fork true 2>/dev/null || exit 77
  TWO_HOSTS_INSIDE=1 exec unshare --user --map-root-user --net --mount --uts --pid --fork --kill-child --mount-proc sh "$0" "$@"
fi
fail() { echo "two_hosts: $1" >&2; exit 77; }
ranks=$1 cut=$2
shift 2
cut_name=comm_ranks  # as the kernel knows the program
mount -t tmpfs run /run || fail "no /run of its own"
mkdir -p /run/netns
work=$(mktemp -d /run/two_hosts.XXXXXX)
ip netns add one && ip netns add two || fail "no network namespaces"
ip link add name v1 type veth peer name v2 || fail "no veth devices"
for i in 1 2; do
  name=$([ $i = 1 ] && echo one || echo two)
  ip link set v$i netns $name && ip -n $name addr add 10.77.0.$i/24 dev v$i && ip -n $name link set v$i up && ip -n $name link set lo up || fail "no address"
done
# What mpirun takes for ssh: HOST COMMAND.
cat > "$work/agent" <<'END'
#!/bin/sh
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"
END
chmod +x "$work/agent"
touch "$work/out"
ip netns exec one unshare --uts sh -c 'hostname one; exec "$@"' sh \
  mpirun -np $((2 * ranks)) --host one:$ranks,two:$ranks --mca plm_rsh_agent "$work/agent" --mca btl tcp,vader,self \
  --mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 "$@" > "$work/out" 2>&1 &
job=$!
if [ "$cut" = cut ]; then
  i=0
  while [ $i -lt 600 ] && kill -0 $job 2>/dev/null && ! grep -q running "$work/out"; do sleep 0.1; i=$((i + 1)); done
  sleep 0.5
  ip -n one link set v1 down && echo "two_hosts: the link is cut"
  # Ranks must end by themselves on both hosts. mpirun may not: it waits for its other half, and a launcher ends it.
  i=0
  while [ $i -lt 200 ] && cat /proc/[0-9]*/comm 2>/dev/null | grep -qx "$cut_name"; do sleep 0.1; i=$((i + 1)); done
  [ $i -lt 200 ] && echo "two_hosts: all ranks have ended, $((i / 10)) s after the cut"
  sleep 1
  kill -KILL $job 2>/dev/null
fi
wait $job 2>/dev/null
code=$?
cat "$work/out"
exit $code
