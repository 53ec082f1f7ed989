# Mounts over what a container has of its own: hostname, hosts, shm_bytes.
mount -t proc proc /proc
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs -o "size=$3,mode=1777" tmpfs /dev/shm
