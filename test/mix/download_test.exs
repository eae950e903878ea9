defmodule Mix.Tasks.Bombus.DownloadTest do
  use ExUnit.Case

  import ExUnit.CaptureIO

  alias Bombus.{Hub, HubServer}
  alias Mix.Tasks.Bombus.{Download, Generate}

  @moduletag :tmp_dir
  @demo Path.expand("../../priv/models/demo", __DIR__)

  setup %{tmp_dir: dir} do
    files = Map.new(File.ls!(@demo), &{&1, File.read!(Path.join(@demo, &1))})
    server = HubServer.start(%{"owner/name" => files})
    System.put_env(%{"HF_ENDPOINT" => HubServer.url(server), "HF_HOME" => dir})
    on_exit(fn -> Enum.each(["HF_ENDPOINT", "HF_HOME"], &System.delete_env/1) end)
  end

  defp download(arguments), do: capture_io(fn -> Download.run(arguments) end)

  test "it writes the folder, and what is there is used", %{tmp_dir: dir} do
    folder = String.trim(download(["owner/name"]))
    assert File.read!(folder <> "/config.json") == File.read!(@demo <> "/config.json")
    assert Hub.cached?("owner/name")
    assert download(["owner/name", "--revision", "main", "--kind", "tokenizer"]) =~ folder
    other = Path.join(dir, "other")
    assert download(["owner/name", "--cache-dir", other]) =~ other

    generate = fn options -> capture_io(fn -> Generate.run(options ++ ["Write a post"]) end) end
    assert generate.(["--model", "owner/name"]) == generate.([])
  end

  test "a word is a file where there is one, else an id where it looks like one" do
    for {word, source} <- [
          {"demo", :demo},
          {"owner/name", {:hf, "owner/name"}},
          {"lib/bombus", {:local, "lib/bombus"}},
          # A training's checkpoint.
          {"lib/bombus.ex", {:local, "lib/bombus.ex"}},
          {"nowhere", {:local, "nowhere"}},
          {"../models", {:local, "../models"}},
          {"/models/one", {:local, "/models/one"}},
          {"a/b/c", {:local, "a/b/c"}}
        ] do
      assert Bombus.Source.from_word(word) == source
    end
  end

  test "mistakes are said in a line" do
    for {arguments, words} <- [
          {[], "expected one repository"},
          {["a/b", "c/d"], "expected one repository"},
          {["a b"], "owner/name"},
          {["owner/name", "--kind", "weights"], "--kind"},
          {["owner/name", "--knd", "model"], "knd"},
          {["owner/name", "--subdir", "../x"], ":subdir"},
          {["owner/other"], "is not there"},
          {["owner/name", "--revision", "v2"], "no revision `v2`"}
        ] do
      assert_raise Mix.Error, ~r/#{words}/, fn -> Download.run(arguments) end
    end
  end
end
