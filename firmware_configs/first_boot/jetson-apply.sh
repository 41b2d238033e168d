#!/bin/sh
# Lays bmoe's files over the root file system that NVIDIA's flasher will write. Run before flash.sh, by root:
#   sudo sh apply.sh /path/to/Linux_for_Tegra
# A first user must be made with NVIDIA's own tools/l4t_create_default_user.sh; the flash memory is left to flash.sh.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
rootfs=${1:?usage: apply.sh /path/to/Linux_for_Tegra}/rootfs
[ -e "$rootfs/etc/nv_tegra_release" ] || { echo "apply.sh: $rootfs is no root file system of a Jetson" >&2; exit 2; }
tar --extract --file "$here/overlay.tar" --directory "$rootfs" --numeric-owner --no-overwrite-dir --keep-directory-symlink
echo "bmoe is laid over $rootfs: now run NVIDIA's flash.sh or l4t_initrd_flash.sh. Then destroy overlay.tar and $rootfs@PLACE@: a token is in both."
