"""What any long job needs: log, files, errors, stamps, locks, devices, signals, planning."""
