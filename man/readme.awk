# Turns README.md into the source of the man page: a title, and what stands from the section Name on. Its headings are in
# capitals, as in CoreDNS's own man pages, and its links lead to the repository.
#
#     awk -v date='November 2026' -f man/readme.awk README.md

BEGIN { printf "%% \"COREDNS-OPTCACHE\" \"7\" \"%s\" \"CoreDNS\" \"CoreDNS Plugins\"\n\n", date }

/^## Name$/ { wanted = 1 }
!wanted { next }
/^(~~~|```)/ { fenced = !fenced }
!fenced && /^## / { $0 = toupper($0) }
!fenced { gsub(/\]\(docs\//, "](https://github.com/optcache/optcache/blob/main/docs/") }
{ print }
