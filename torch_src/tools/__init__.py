"""The library side of script/: mining, search page and its feedback, data check, distillation."""
