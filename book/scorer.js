// What a search shows first: chapters and terms of the glossary, a class or function by its full name, then other pages;
// attributes and modules of the package last.
// `var`, not `const`: the search tools declare the same name.
var Scorer = {
  score: ([docname, title, anchor, description, score]) => {
    if (docname.startsWith("notebooks/")) return score + 4;
    if (!docname.startsWith("book/api/")) return score;
    return /^Python (class|function|exception)/.test(description || "") ? score : score - 40;
  },
  objNameMatch: 30,
  objPartialMatch: 1,
  objPrio: { 0: 0, 1: 0, 2: 0 }, // all objects of the package
  objPrioDefault: 8, // terms
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
