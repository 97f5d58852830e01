# Draws bars, as SVG: groups of them, each group to a scale of its own, with the figures beside them.
#
#     awk -F'\t' -v title=TITLE -v unit=UNIT -f bench/bars.awk <LINES >FILE.svg
#
# A line is a group, the name of a bar and its length. The colours are those of hitratio.svg.

function escape(s) { gsub(/&/, "\\&amp;", s); gsub(/</, "\\&lt;", s); return s }

{
    if (!($1 in first)) { first[$1] = NR; groups[++count] = $1 }
    group[NR] = $1; name[NR] = $2; value[NR] = $3
    if ($3 > longest[$1]) longest[$1] = $3
}

END {
    label = 170; width = 420; bar = 20; height = 44 + NR * bar + count * 34
    printf "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" role=\"img\">\n", label + width + 120, height, label + width + 120, height
    printf "<title>%s</title>\n", escape(title)
    print "<style>text { font: 11px system-ui, sans-serif; fill: #24292f } .page { fill: #ffffff }"
    print ".title { font-size: 16px; font-weight: 600 } .panel { font-size: 13px; font-weight: 600 } .ours { font-weight: 700 }"
    print ".bar { fill: #999999 } .bar.ours { fill: #d55e00 }"
    print "@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .page { fill: #0d1117 } }</style>"
    print "<rect class=\"page\" width=\"100%\" height=\"100%\"/>"
    printf "<text class=\"title\" x=\"12\" y=\"26\">%s</text>\n", escape(title (unit == "" ? "" : ", " unit))
    y = 44
    for (g = 1; g <= count; g++) {
        if (groups[g] != "") { y += 20; printf "<text class=\"panel\" x=\"12\" y=\"%d\">%s</text>\n", y - 4, escape(groups[g]) }
        for (i = 1; i <= NR; i++) {
            if (group[i] != groups[g]) continue
            ours = name[i] ~ /^optcache/ ? " ours" : ""
            long = longest[groups[g]] > 0 ? value[i] / longest[groups[g]] * width : 0
            printf "<text class=\"name%s\" x=\"%d\" y=\"%d\" text-anchor=\"end\">%s</text>", ours, label - 8, y + 14, escape(name[i])
            printf "<rect class=\"bar%s\" x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%d\"/>", ours, label, y + 3, long, bar - 5
            printf "<text class=\"figure%s\" x=\"%.1f\" y=\"%d\">%s</text>\n", ours, label + long + 6, y + 14, escape(value[i])
            y += bar
        }
        y += 14
    }
    print "</svg>"
}
