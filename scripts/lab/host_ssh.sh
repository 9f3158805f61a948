#!/bin/sh
# In an emulated host: OpenSSH from what ssh.py has unpacked, with the keys that pair.py has put into $keys; sshd listens
# on the emulated network alone. What is written here is gone with the host.
#   variables: tree keys name address peer peer_address path
set -eu

[ "$(hostname)" = kvmpy-lab ] || { echo "host_ssh.sh: is for emulated hosts: it replaces the machine's ssh set-up" >&2; exit 1; }
hostname "$name"
cp -rsn "$tree/." / 2>/dev/null || true # links to what this machine lacks; what it has stays
ldconfig
printf '%s %s\n' "$address" "$name" "$peer_address" "$peer" >>/etc/hosts

grep -q '^sshd:' /etc/passwd || echo 'sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin' >>/etc/passwd
sed -i 's/^root:[^:]*:/root:*:/' /etc/shadow # "!" would be a locked account, which no key opens
mkdir -p /run/sshd
chmod 600 "$keys/host" "$keys/user"

cat >"$keys/sshd_config" <<END
ListenAddress $address
HostKey $keys/host
AuthorizedKeysFile $keys/user.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile $keys/sshd.pid
Subsystem sftp internal-sftp
SetEnv PATH=$path
END

rm -rf /root/.ssh
mkdir -m 700 /root/.ssh
for host in "$name" "$peer" "$address" "$peer_address"; do echo "$host $(cut -d' ' -f1,2 "$keys/host.pub")"; done >/root/.ssh/known_hosts
printf 'IdentityFile %s\nIdentitiesOnly yes\n' "$keys/user" >/root/.ssh/config

/usr/sbin/sshd -f "$keys/sshd_config"
