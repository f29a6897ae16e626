"""The ground everything stands on: ids, time, problems, pages, changes and loops. Imports nothing else of the product."""
