"""Files to rows and back: formats, collection, passage ids, training sets, candidates, mined files."""
