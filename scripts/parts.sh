# Sourced by scripts that run several parts, all of them whatever comes of those before, and fail if one failed.
part_rows=()
part_status=0

# part NAME COMMAND...
part() {
  local name="$1" begin=$SECONDS said=ok
  shift
  printf '\n=== %s\n' "$name"
  "$@" || { part_status=1 said=FAILED; }
  part_rows+=("$(printf '%-6s %4d s  %s' "$said" $((SECONDS - begin)) "$name")")
}

# Prints what came of each part, and ends with exit code 1 if one failed, or with that given.
summary() {
  printf '\n=== parts\n'
  printf '%s\n' "${part_rows[@]}"
  exit "${1:-$part_status}"
}

# pytest tidies up after Ctrl-C and ends by itself: without a trap of ours bash would go on with the next part.
trap 'trap - INT; part_rows+=("interrupted"); summary 130' INT
