#!/bin/sh
# The first boot of a Raspberry Pi OS without cloud-init: started by systemd.run= in cmdline.txt, before the network.
# It must not stop half way, for the board would then boot into it again.
set +e
boot=@MOUNT@
hostname=@HOSTNAME@
timezone=@TIMEZONE@
country=@COUNTRY@
ssh=@SSH@

if [ -n "$hostname" ]; then
    old=$(cat /etc/hostname)
    echo "$hostname" > /etc/hostname
    sed -i "s/^127\.0\.1\.1.*/127.0.1.1\t$hostname/" /etc/hosts
    grep -q '^127\.0\.1\.1' /etc/hosts || printf '127.0.1.1\t%s\n' "$hostname" >> /etc/hosts
    echo "bmoe first boot: $old is $hostname from now on"
fi
if [ -n "$timezone" ] && [ -e "/usr/share/zoneinfo/$timezone" ]; then
    rm -f /etc/localtime
    ln -s "/usr/share/zoneinfo/$timezone" /etc/localtime
    echo "$timezone" > /etc/timezone
fi
if [ -f "$boot/bmoe/wifi.nmconnection" ]; then
    install -D -m 600 "$boot/bmoe/wifi.nmconnection" /etc/NetworkManager/system-connections/bmoe-wifi.nmconnection &&
        rm -f "$boot/bmoe/wifi.nmconnection"
    if [ -n "$country" ] && command -v raspi-config > /dev/null; then
        raspi-config nonint do_wifi_country "$country"
    fi
    rfkill unblock wifi
    for state in /var/lib/systemd/rfkill/*:wlan; do
        [ -e "$state" ] && echo 0 > "$state"
    done
fi
if [ "$ssh" = yes ]; then
    systemctl enable ssh
    printf 'PasswordAuthentication no\n' > /etc/ssh/sshd_config.d/50-bmoe.conf
    # The wizard for a first user would wait for somebody at a screen.
    systemctl disable userconfig
    rm -f /etc/ssh/sshd_config.d/rename_user.conf
fi
sh "$boot/bmoe/install.sh" --enable

# A plug pulled between these lines must find either this script once more, or all that it did and no word of it.
sync
sed -i 's| systemd\.run=[^ ]*||; s| systemd\.run_success_action=[^ ]*||; s| systemd\.unit=kernel-command-line\.target||' \
    "$boot/cmdline.txt"
sync
rm -f "$boot/firstrun.sh"
sync
exit 0
