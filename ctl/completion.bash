# bash completion for gitopper and its client: source <(gitopper ctl --completion)

# The hosts of known_hosts, as ctl names them; hashed ones and patterns can't be named.
_gitopper_hosts() {
  local names name rest
  set -f # for this subshell
  while read -r names rest; do
    case $names in
    '#'* | '|'* | @*) continue ;;
    esac
    for name in ${names//,/ }; do
      case $name in
      *[!A-Za-z0-9.:_%[\]-]*) continue ;; # bash would expand what stands in it
      \[*:*\]:2222) name=${name%:2222} ;;
      \[*:*\]:*) ;;
      \[*\]:*)
        name=${name#\[}
        name=${name/\]:/:}
        name=${name%:2222}
        ;;
      *:*) name="[$name]" ;;
      esac
      printf '%s\n' "$1$name"
    done
  done 2>/dev/null <"$2"
}

# Replies with those words that begin as what is typed. Bash takes what stands behind a colon for a word of its
# own, unless it is told otherwise: what stands in front of it is then not said again.
_gitopper_reply() {
  local typed=$1 said='' reply
  shift
  [[ $COMP_WORDBREAKS != *:* ]] || said=${typed%"${typed##*:}"}
  while read -r reply; do
    COMPREPLY+=("${reply#"$said"}")
  done < <(compgen -W "$*" -- "$typed")
}

_gitopper() {
  local line=${COMP_LINE:0:COMP_POINT} known=~/.ssh/known_hosts before='' typed word
  local -a words=() asked=()
  typed=${line##*[[:blank:]]}
  read -ra words <<<"${line%"$typed"}"
  words=("${words[@]:1}")
  COMPREPLY=()

  if [[ ${1##*/} != gitopperctl ]]; then
    if [[ ${words[0]-} != ctl ]]; then
      [[ ${#words[@]} -gt 0 ]] || asked=(ctl)
      [[ ${#words[@]} -eq 0 || $typed == -* ]] || return 0
      _gitopper_reply "$typed" "${asked[@]}" "$("$1" --help 2>/dev/null | grep -oE -- '--[a-z-]+' | sort -u)"
      return 0
    fi
    words=("${words[@]:1}")
  fi

  # Options with a value are apart from it, or have it behind a =.
  for word in "${words[@]}"; do
    if [[ $before == -[ipkJl] ]]; then
      [[ $before != -k ]] || known=${word/#\~/$HOME}
      before=
      continue
    fi
    before=$word
    [[ $word == [-@]* ]] || asked+=("$word")
  done

  case $before in
  -i | -k) return 0 ;; # a file
  -J) _gitopper_reply "$typed" "$(_gitopper_hosts '' "$known")" && return 0 ;;
  -l) _gitopper_reply "$typed" en nl && return 0 ;;
  esac
  case $typed in
  -*) _gitopper_reply "$typed" -i -p -k -J -a -m -l --help --version --completion && return 0 ;;
  @*) _gitopper_reply "$typed" "$(_gitopper_hosts @ "$known")" && return 0 ;;
  esac
  case ${asked[*]} in
  '') _gitopper_reply "$typed" list "do" hdr ;;
  list | ls | l) _gitopper_reply "$typed" machines service log diff ;;
  do | d) _gitopper_reply "$typed" freeze unfreeze rollback pull ;;
  esac
}
complete -o default -F _gitopper gitopper gitopperctl
