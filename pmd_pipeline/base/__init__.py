"""Storage, tables, parallel execution, progress and records: what every stage stands on."""
