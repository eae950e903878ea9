#!/bin/sh
# Puts Elixir 1.18 on Erlang/OTP 27 into a private prefix on Debian 12 (x86-64), from Debian 13's packages.
# Changes nothing outside the prefix; run again, it does nothing. Needs root or not: only `apt-get download` is used.
#   sh beam.sh ABSOLUTE_PREFIX && export PATH=ABSOLUTE_PREFIX/bin:$PATH
# The prefix must be absolute and final: the ELF interpreter path is written into the binaries.
set -eu
PREFIX=${1:?usage: beam.sh ABSOLUTE_PREFIX}
case $PREFIX in /*) ;; *) echo "beam.sh: the prefix must be absolute" >&2; exit 2 ;; esac
PATH=$PREFIX/bin:$PATH
if [ -x "$PREFIX/bin/mix" ] && "$PREFIX/bin/elixir" --version >/dev/null 2>&1; then exit 0; fi

# The machine's own Debian mirror, whatever it is, asked for trixie as well as for its own release.
mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -n 1)
[ -n "$mirror" ] || mirror=$(sed -n 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) .*/\2/p' /etc/apt/sources.list | head -n 1)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/debs" "$work/root" "$PREFIX/rt" "$PREFIX/bin"
for suite in trixie bookworm; do echo "deb [signed-by=$keyring] $mirror $suite main"; done > "$work/sources.list"
private_apt() {
  apt-get -q -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" \
    -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null \
    -o Dir::Etc::preferencesparts=/dev/null -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
    -o APT::Sandbox::User=root -o APT::Update::Post-Invoke::= "$@"
}
private_apt update >/dev/null
(
  cd "$work/debs"
  private_apt download patchelf/bookworm $(for package in elixir erlang-base erlang-dev erlang-crypto erlang-mnesia \
    erlang-asn1 erlang-public-key erlang-runtime-tools erlang-ssl erlang-inets erlang-parsetools erlang-tools \
    erlang-syntax-tools erlang-eunit erlang-os-mon erlang-xmerl erlang-edoc \
    libc6 libstdc++6 libgcc-s1 libtinfo6 zlib1g libssl3t64 libsystemd0 libcap2 libzstd1; do echo "$package/trixie"; done) >/dev/null
)
for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/root"; done

cp -a "$work/root/usr/lib/erlang" "$work/root/usr/lib/elixir" "$PREFIX/"
cp -aL "$work"/root/usr/lib/x86_64-linux-gnu/*.so* "$PREFIX/rt/"
patchelf=$work/root/usr/bin/patchelf
find "$PREFIX/erlang" -type f | while read -r file; do
  [ "$(head -c4 "$file" | od -An -c | tr -d ' \n')" = '177ELF' ] || continue
  case $file in
    *.a|*.o) ;;
    *.so) "$patchelf" --force-rpath --set-rpath "$PREFIX/rt" "$file" ;;
    *) "$patchelf" --force-rpath --set-rpath "$PREFIX/rt" --set-interpreter "$PREFIX/rt/ld-linux-x86-64.so.2" "$file" ;;
  esac
done
grep -lrI '/usr/lib/erlang' "$PREFIX/erlang/bin" "$PREFIX"/erlang/erts-*/bin "$PREFIX/erlang/releases" 2>/dev/null |
  xargs -r sed -i "s#/usr/lib/erlang#$PREFIX/erlang#g"
for name in erl erlc escript; do ln -sfn "../erlang/bin/$name" "$PREFIX/bin/$name"; done
ln -sfn "$(cd "$PREFIX" && ls -d erlang/erts-*/bin/epmd | sed 's#^#../#')" "$PREFIX/bin/epmd"
for name in elixir elixirc mix iex; do ln -sfn "../elixir/bin/$name" "$PREFIX/bin/$name"; done
"$PREFIX/bin/elixir" --version
