from cocoop_fast.cli import main

main()
