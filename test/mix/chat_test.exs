defmodule Mix.Tasks.Bombus.ChatTest do
  use ExUnit.Case

  import ExUnit.CaptureIO

  alias Mix.Tasks.Bombus.Chat

  @adapters Path.expand("../../priv/models/adapters", __DIR__)

  # -> the lines of the answers
  defp chat(lines, options \\ []) do
    input = Enum.map_join(lines, &(&1 <> "\n"))
    capture_io(input, fn -> Chat.run(["--max-new-tokens", "40" | options]) end)
  end

  setup_all do
    model = Bombus.load_model!(:demo)
    %{serving: Bombus.Serving.new(model, Bombus.load_tokenizer!(:demo), max_new_tokens: 40)}
  end

  defp answer(serving, messages, options \\ %{}) do
    %{results: [%{text: text}]} =
      Bombus.Serving.run(serving, Map.put(options, :messages, messages))

    text
  end

  defp user(text), do: %{role: "user", content: text}
  defp assistant(text), do: %{role: "assistant", content: text}

  test "it knows what was said before, until it is to forget it", %{serving: serving} do
    {coffee, tea} = {"Write a post about coffee", "Write a post about tea"}
    first = answer(serving, [user(coffee)])
    second = answer(serving, [user(coffee), assistant(first), user(tea)])
    system = [%{role: "system", content: "You like rain."}]
    third = answer(serving, system ++ [user(coffee)])

    lines = [
      coffee,
      "",
      tea,
      "/reset",
      "/system You like rain.",
      coffee,
      "/system",
      "/reset",
      coffee
    ]

    assert chat(lines) == Enum.map_join([first, second, third, first], &(&1 <> "\n"))
    assert chat([coffee], ["--system", "You like rain."]) == third <> "\n"
    # No line behind /quit is heard.
    assert chat(["/quit", coffee]) == ""
    assert chat(["//help"]) == answer(serving, [user("/help")]) <> "\n"
  end

  test "it changes adapters by their names", %{serving: serving} do
    rain = "Write a post about rain"

    with_adapter = fn name, scale ->
      adapter = name && Bombus.load_adapter!({:demo, name}, scale: scale)
      answer(serving, [user(rain)], %{adapter: adapter}) <> "\n"
    end

    lines = [
      "/adapter pirate",
      rain,
      "/reset",
      "/adapter none",
      rain,
      "/reset",
      "/adapter news",
      rain
    ]

    [pirate, none, news] = for name <- ["pirate", nil, "news"], do: with_adapter.(name, nil)
    assert chat(lines) == pirate <> none <> news

    assert chat(["/adapter #{@adapters}/news", rain, "/adapter"]) ==
             news <> "  none\n* news\n  pirate\n"

    named = ["--adapter", "ship=#{@adapters}/pirate", "--adapter", "news"]
    assert chat([rain, "/reset", "/adapter news", rain], named) == pirate <> news
    assert chat(["/adapter"], named) == "  none\n  news\n  pirate\n* ship\n"
    weak = with_adapter.("pirate", 0.001)
    assert chat([rain], named ++ ["--scale", "0.001"]) == weak
  end

  test "what goes wrong is a line, and the conversation goes on", %{serving: serving} do
    tea = "Write a post about tea"

    for {line, words} <- [
          {"/adaptor pirate", "unknown command /adaptor, did you mean /adapter?"},
          {"/xyz", "unknown command /xyz (/help"},
          {"/adapter ./nowhere", "no folder"},
          {"/adapter poet", "poet"},
          {String.duplicate("rain ", 3000), "token"}
        ] do
      said =
        capture_io(:stderr, fn ->
          output =
            capture_io(line <> "\n" <> tea <> "\n", fn -> send(self(), {:ended, ended()}) end)

          assert output == answer(serving, [user(tea)]) <> "\n"
        end)

      assert said =~ words
      assert_received {:ended, {:exit, {:shutdown, 1}}}
    end

    assert chat(["/help"]) =~ "/adapter"

    for {arguments, words} <- [
          {["hello"], "mix bombus.generate"},
          {["--scale", "2"], "--adapter"},
          {["--adapter", "./nowhere"], "no folder"},
          {["--sytem", "a"], "unknown option --sytem, did you mean --system?"}
        ] do
      raised = assert_raise Mix.Error, fn -> chat([], arguments) end
      assert Exception.message(raised) =~ words
    end
  end

  defp ended do
    Chat.run(["--max-new-tokens", "40"])
  catch
    :exit, reason -> {:exit, reason}
  end

  test "it says what it is" do
    assert capture_io(fn -> Chat.run(["-h"]) end) =~ "/adapter NAME"
  end

  @python System.find_executable("python3")

  describe "in a terminal" do
    @describetag skip: if(@python == nil, do: "there is no python3, which has terminals")

    # Python copies between its own streams and a terminal that it makes.
    defp terminal(arguments) do
      spawn = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
      mix = System.find_executable("mix")
      arguments = ["-c", spawn, mix, "bombus.chat", "--device", "cpu" | arguments]
      port = Port.open({:spawn_executable, @python}, [:binary, :exit_status, args: arguments])
      {:os_pid, os_pid} = Port.info(port, :os_pid)
      on_exit(fn -> System.cmd("kill", ["-KILL", "#{os_pid}"], stderr_to_stdout: true) end)
      port
    end

    defp wait_for(port, words, seen \\ "") do
      if String.contains?(seen, words) do
        seen
      else
        receive do
          {^port, {:data, bytes}} -> wait_for(port, words, seen <> bytes)
          {^port, {:exit_status, status}} -> flunk("it ended with #{status}: #{seen}")
        after
          30_000 -> flunk("no #{inspect(words)} in: #{seen}")
        end
      end
    end

    test "Ctrl-C stops an answer, not the conversation" do
      # So hot that it has more than a thousand tokens.
      port = terminal(~w(--temperature 8 --seed 4 --max-new-tokens 2000))
      wait_for(port, "> ")
      Port.command(port, "half a line\x03")
      wait_for(port, "/quit or Ctrl-D")
      Port.command(port, "Write\n")
      wait_for(port, "Write\r\n")
      assert_receive {^port, {:data, _text}}, 30_000
      Port.command(port, "\x03")
      assert wait_for(port, " [stopped]") |> String.length() < 20_000
      Port.command(port, "/adapter\n")
      wait_for(port, "* none")
      Port.command(port, "/quit\n")
      assert_receive {^port, {:exit_status, 0}}, 30_000
    end
  end
end
