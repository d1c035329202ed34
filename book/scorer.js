// What a search shows first: chapters and terms of the glossary, then other pages, and modules of the package last.
// `var`, not `const`: the search tools declare the same name.
var Scorer = {
  score: ([docname, title, anchor, description, score]) => docname.startsWith("notebooks/") ? score + 4 : score,
  objNameMatch: 11,
  objPartialMatch: 1,
  objPrio: { 0: -10, 1: 0, 2: -5 }, // modules; classes and functions; attributes
  objPrioDefault: 8, // terms
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
