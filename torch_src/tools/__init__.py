"""The library side of script/: mining, search service, data check."""
